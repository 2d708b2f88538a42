"""How far training has moved the weights, by layer and kind of tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from estune.errors import EstuneError
from estune.journal.base import base_checkpoint
from estune.journal.records import Header
from estune.study.report.runs import Run
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import hub_name, is_here
from estune.weights.parameters import layer_of
from estune.weights.tensors import RUN_LENGTH, Tensor


@dataclass(frozen=True)
class LayerTable:
    """Relative change, ||difference|| / ||base||, of each layer (or tensor outside the layers) and kind of tensor."""

    checkpoint: str  # the folder of the one compared with the base
    step: int | None  # after which it was saved; None for the best, whose folder does not say
    dtype: str
    kinds: list[str]
    rows: list[tuple[str, list[float | None], float]]  # layer, by kind (None where it has none), and in all
    total: float

    @property
    def largest(self) -> float:
        """The largest entry, for shading."""
        return max((v for _, values, whole in self.rows for v in (*values, whole) if v is not None), default=0.0)


def layer_table(run: Run) -> LayerTable:
    """Compare the base with the run's final checkpoint, or its best so far, a million elements at a time.

    Raises:
        EstuneError: base model or checkpoint are not there, or are not the run's.
    """
    final = run.directory.final
    best = run.directory.best
    target = next((p for p in (final, best) if p.is_dir()), None)
    if target is None:
        raise EstuneError("no checkpoint yet")
    header = run.journal.header
    base = _local_base(header, run.journal.base_model())
    trained = Checkpoint(target)
    squares: dict[tuple[str, str], np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    for name in header.tensors:
        if name not in base.tensors or name not in trained.tensors:
            raise EstuneError(f"{target} has no tensor {name}")
        if base.tensors[name].shape != trained.tensors[name].shape:
            raise EstuneError(f"{target}: tensor {name} has another shape than in the base model")
        where = layer_of(name)
        squares[where] = squares.get(where, np.zeros(2)) + _squares(base.tensors[name], trained.tensors[name])
    layers = sorted({layer for layer, _ in squares}, key=lambda v: (not v.isdigit(), int(v) if v.isdigit() else 0, v))
    kinds = list(dict.fromkeys(kind for layer, kind in squares if layer.isdigit()))
    rows = []
    for layer in layers:
        values = [_ratio(squares[layer, k]) if (layer, k) in squares else None for k in kinds]
        rows.append((layer, values, _ratio(sum(s for (name, _), s in squares.items() if name == layer))))
    stored = trained.tensors[next(iter(header.tensors))].dtype
    total = _ratio(sum(squares.values()))
    if target == best and total == 0.0:
        raise EstuneError("the best checkpoint so far is the base model, and there is no final one yet")
    return LayerTable(target.name, run.done if target == final else None, stored, _short(kinds), rows, total)


def _local_base(header: Header, model: str) -> Checkpoint:
    """The base checkpoint, which must be on this machine, as a report downloads nothing."""
    if not is_here(model):
        from huggingface_hub import snapshot_download

        try:
            name, revision = hub_name(model)
            model = snapshot_download(name, revision=revision, local_files_only=True)
        except Exception as error:  # as many kinds as for a download; each means that it is not here
            raise EstuneError(f"base model {model} is not on this machine") from error
    return base_checkpoint(header, model)


def _squares(base: Tensor, trained: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Sums of squares of the difference and of the base, float64 `[2]`."""
    total = np.zeros(2)
    for start in range(0, base.elements, RUN_LENGTH):
        count = min(RUN_LENGTH, base.elements - start)
        old = base.read(start, count).astype(np.float64)
        new = trained.read(start, count)
        total += (np.square(new - old).sum(), np.square(old).sum())
    return total


def _ratio(squares: object) -> float:
    """The norm of the change over that of the base, from sums of squares `[2]`; 0 for sums over nothing."""
    change, norm = np.broadcast_to(np.asarray(squares, np.float64), 2)
    return math.sqrt(change / norm) if norm else 0.0


def _short(kinds: list[str]) -> list[str]:
    """The kinds' names without the module around them, if that stays unambiguous."""
    last = [".".join(k.split(".")[-2 if k.endswith(".bias") else -1 :]) for k in kinds]
    return [short if last.count(short) == 1 else kind for short, kind in zip(last, kinds, strict=True)]
