"""Noise, version 1: `normal(seed, tensor, index)` as a pure function of its arguments.

The noise of an element depends on the member's seed, the parameter's name in the checkpoint and the element's position
in it, and on nothing else: any shard, any order and any number of threads draw the same bits. `reference` is the
specification in NumPy, `cpu` the compiled kernels, `gpu` those in Triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["normal"]


def normal(seed: int, tensor: str, start: int, count: int) -> npt.NDArray[np.float32]:
    """Noise of `count` elements of a parameter, from row-major position `start` on.

    Args:
        seed: the member's 64-bit seed.
        tensor: the parameter's name in the checkpoint, such as `model.layers.0.self_attn.q_proj.weight`.
        start: first element, 0 or more.
        count: number of elements, 0 or more.

    Returns:
        float32 `[count]`, standard normal, tails to 5.77.
    """
    from estune.noise import cpu_draw, reference

    if not 0 <= seed < 2**64 or start < 0 or count < 0:
        raise ValueError(f"noise of seed {seed}, elements {start} + {count}: the seed is 64-bit, positions are from 0")
    return cpu_draw.normal(seed, reference.tensor_id(tensor), start, count)
