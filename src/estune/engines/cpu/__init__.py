"""The decoder for CPUs: a model's layers fused into a few kernels, compiled by Numba.

Begin with `fused.py`, which calls `kernels.py`, which are written in the vectors of `simd.py`.
"""
