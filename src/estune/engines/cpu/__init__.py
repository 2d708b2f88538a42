"""The decoder for CPUs: a model's layers fused into a few kernels, compiled by Numba.

Begin with `fused.py`, which takes weights as `layers.py` has them and calls `kernels.py`, written in vectors of `simd.py`.
"""
