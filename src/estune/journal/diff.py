"""In what two runs differ: what they began with, the first step that is another, how far their weights are apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from estune.errors import EstuneError
from estune.journal.distance import Distance, distances
from estune.journal.journal import Journal
from estune.journal.records import StepRecord
from estune.weights.rebuild import Told, unheard

_WHERE = {"output_dir"}  # settings in which runs differ without being others
_BEGUN_WITH = ("base_hash", "task", "data_hash", "dtype", "live_dtype", "fingerprint", "noise_version")
_NAMED = ("files", "code", "packages")


@dataclass(frozen=True)
class Difference:
    """Of two runs, A and B. Values are given in pairs, None where there is none."""

    settings: dict[str, tuple[Any, Any]]  # by name, those of sections with dots
    begun_with: dict[str, tuple[Any, Any]]  # base model, data, code, libraries, by the name that the header has for it
    steps: tuple[int, int]  # of each, with those of the runs that it goes on from
    first: (
        int | None
    )  # the first step that is another, counted from 1 over all; None where all that both have are equal
    fields: tuple[str, ...]  # in what it is another
    layers: list[Distance]  # of the weights after the last steps; empty where they were not compared
    why: str  # why they were not


def diff(
    a: str | Path,
    b: str | Path,
    models: tuple[str | None, str | None] = (None, None),
    *,
    weights: bool = True,
    told: Told = unheard,
) -> Difference:
    """In what two runs differ.

    Args:
        a, b: their directories, or their journals in the compact form.
        models: their base models, where they lie elsewhere than the journals say.
        weights: compare their weights as well, for which both are replayed.
        told: hears what share is done, 0 to 1.

    Raises:
        EstuneError: a journal is not there, or damaged.
    """
    one = Journal.read(Path(a))
    other = Journal.read(Path(b))
    steps = (len(one.history), len(other.history))
    first, fields = _first(one.history, other.history)
    layers: list[Distance] = []
    why = "" if weights else "not asked for"
    if weights:
        try:
            layers = distances(one, other, models, told)
        except EstuneError as error:  # the rest can be told all the same
            why = str(error)
    settings = _pairs(flatten(one.settings), flatten(other.settings), _WHERE)
    begun_with = _pairs(_begun_with(one), _begun_with(other))
    return Difference(settings, begun_with, steps, first, fields, layers, why)


def _begun_with(journal: Journal) -> dict[str, Any]:
    header = vars(journal.header)
    named = {f"{key}.{name}": value for key in _NAMED for name, value in header[key].items()}
    return {key: header[key] for key in _BEGUN_WITH} | named


def _pairs(
    one: Mapping[str, Any], other: Mapping[str, Any], without: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    names = [name for name in dict.fromkeys([*one, *other]) if name not in without]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections spread out, under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _first(one: list[StepRecord], other: list[StepRecord]) -> tuple[int | None, tuple[str, ...]]:
    for number, (a, b) in enumerate(zip(one, other, strict=False), 1):
        fields = {
            "members": (a.update.members, b.update.members),
            "prompts": (a.prompts, b.prompts),
            "sigma": (a.sigma, b.sigma),
            "learning rate": (a.learning_rate, b.learning_rate),
            "rewards": (a.rewards, b.rewards),
            "coefficients": (a.update.coefficients, b.update.coefficients),
            "earlier steps' share": (a.update.factors, b.update.factors),
            "decay": (a.update.decay, b.update.decay),
            "anchor": ((a.update.anchor, a.update.anchor_l1), (b.update.anchor, b.update.anchor_l1)),
            "moments": (a.update.moments, b.update.moments),
            "weights": (a.fingerprint, b.fingerprint),
        }
        differing = tuple(name for name, (x, y) in fields.items() if x != y)
        if differing:
            return number, differing
    return None, ()
