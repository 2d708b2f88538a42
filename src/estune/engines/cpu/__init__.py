"""The decoder for CPUs: a model's layers fused into a few kernels, compiled by Numba.

Begin with `fused.py`, which takes weights from `layers.py` and calls `kernels.py`, written in the vectors of `simd.py`.
"""
