"""Factors of the perturbations of single tensors: by patterns of their names, or in proportion to their weights.

With D the diagonal of the factors, a member is theta + sigma D eps and an update alpha / N sum_n z_n D eps_n: a
search whose distribution has the covariance sigma^2 D^2, as separable natural evolution strategies have it (Wierstra et
al. 2014, JMLR 15, section 3.5). The factors are settled before a run begins, and are in its journal's header.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from estune.errors import EstuneError
from estune.weights.checkpoint import Checkpoint
from estune.weights.tensors import RUN_LENGTH

Scale = float | Literal["rms"]


def scales_of(patterns: Mapping[str, Scale], checkpoint: Checkpoint, names: Collection[str]) -> dict[str, float]:
    """The factor of each tensor that has another than 1, a float32 value.

    Args:
        patterns: factors by shell pattern; of several that fit, the first counts. `rms` is the tensor's root mean
            square over that of all tensors together.
        checkpoint: the base model.
        names: the trained tensors.

    Raises:
        EstuneError: a pattern fits none of them, or a tensor has no root mean square to go by.
    """
    refuse_unused(patterns, names)
    chosen = {
        name: next((s for p, s in patterns.items() if fnmatchcase(name, p)), 1.0) for name in dict.fromkeys(names)
    }
    if "rms" not in chosen.values():
        return {name: float(np.float32(scale)) for name, scale in chosen.items() if scale != 1.0}
    squares = {name: _squares(checkpoint, name) for name in chosen}
    elements = {name: checkpoint.tensors[name].elements for name in chosen}
    whole = math.sqrt(math.fsum(squares.values()) / sum(elements.values()))
    found = {}
    for name, scale in chosen.items():
        factor = float(np.float32(math.sqrt(squares[name] / elements[name]) / whole if scale == "rms" else scale))
        if not factor > 0:
            raise EstuneError(
                f"sigma_scale: the weights of {name} are all zero, and rms would leave them so: give a pattern that "
                "fits it a factor, before the others"
            )
        if factor != 1.0:
            found[name] = factor
    return found


def refuse_unused(patterns: Collection[str], names: Collection[str]) -> None:
    """Refuse patterns of factors one of which fits none of the trained tensors' names.

    Raises:
        EstuneError: naming it.
    """
    if unused := next((pattern for pattern in patterns if not any(fnmatchcase(n, pattern) for n in names)), None):
        raise EstuneError(
            f"sigma_scale: no trained parameter's name fits the pattern {unused!r}; names look like {next(iter(names))}"
        )


def _squares(checkpoint: Checkpoint, name: str) -> float:
    """Sum of the squares of a tensor's elements, in an order that is the same on all machines."""
    from estune.noise import cpu_sums

    tensor = checkpoint.tensors[name]
    parts = (tensor.read(at, min(RUN_LENGTH, tensor.elements - at)) for at in range(0, tensor.elements, RUN_LENGTH))
    return math.fsum(total for part in parts for total in cpu_sums.squares(part, part)[:, 1].tolist())
