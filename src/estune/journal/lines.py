"""A line of a journal: its seal, and what it may hold.

Checksums tell that a line was changed by accident; who changes one on purpose makes them anew, and what he writes is
looked at here, field by field, before anything is done by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from estune.charts.words import amount
from estune.errors import EstuneError
from estune.weights.grid import GroupSize
from estune.weights.policies import POLICIES, DType, NoiseMode, PolicyName, Rounding

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}$")]
MaybeHash = Annotated[str, Field(pattern=r"^[0-9a-f]{0,32}$")]
Seed = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Count = Annotated[int, Field(ge=0)]
Names = dict[str, str]


class Line(BaseModel):
    """Any line: no field too many, and none of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Settings(Line):
    """Settings, whatever they are: `Config` knows them. Two of them are looked at before it does."""

    model_config = ConfigDict(extra="allow", strict=True)

    steps: Count = 0
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None


class HeaderLine(Line):
    """As `Header`."""

    model: str
    base_hash: Hash
    policy: PolicyName
    rounding: Rounding
    noise: NoiseMode
    dtype: DType
    live_dtype: DType
    tensors: dict[str, list[str]]
    fingerprint: Hash
    task: str
    data_hash: MaybeHash
    config: Settings
    packages: Names
    created: str
    ancestors: list[Hash] = []
    files: Names = {}
    code: Names = {}
    best_by: Annotated[list[str], Field(min_length=1)] = ["eval_accuracy", "eval_reward"]
    place: str = ""
    folder: str = ""
    shares: list[str] | None = None
    scales: dict[str, Annotated[float, Field(gt=0)]] = {}
    prompts_hash: MaybeHash = ""
    group_size: Literal[0] | GroupSize = 0
    carry_steps: Count = 0
    format: int
    noise_version: int

    @model_validator(mode="after")
    def _has_grid(self) -> Self:
        if bool(POLICIES[self.policy].bits) != bool(self.group_size and self.carry_steps):
            raise ValueError(f"policy {self.policy} with group_size {self.group_size}, carry_steps {self.carry_steps}")
        return self


class StepLine(Line):
    """A step, as `docs/journal.md` describes it."""

    step: Count
    seeds: list[Seed]
    signs: list[Literal[1, 0, -1]]
    rewards: list[float | None]
    coefficients: list[float]
    decay: Annotated[float, Field(le=0)]
    rounding_seed: Seed
    sigma: Annotated[float, Field(gt=0)]
    learning_rate: float
    prompts: list[Count]
    fingerprint: Hash
    metrics: dict[str, float]
    staleness: list[Literal[0, 1]] = []
    earlier: list[float] = []
    anchor: Annotated[float, Field(ge=0)] = 0.0
    anchor_l1: Annotated[float, Field(ge=0)] = 0.0
    moments: Annotated[list[float], Field(min_length=5, max_length=5)] = []
    fitness: list[float | None] = []
    state: dict[str, float] = {}

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if_any = [each or self.seeds for each in (self.staleness, self.fitness)]
        lengths = {len(each) for each in (self.seeds, self.signs, self.rewards, self.coefficients, *if_any)}
        if len(lengths) > 1:
            raise ValueError("seeds, signs, rewards, coefficients, staleness and fitness are not equally many")
        rate, beta1, beta2, correction, epsilon = self.moments or (0.0, 0.0, 0.0, 1.0, 1.0)
        if not (rate >= 0 <= beta1 < 1 and 0 <= beta2 < 1 <= correction and epsilon > 0):
            raise ValueError(f"moments are {self.moments}, which no step has")
        if len(self.earlier) > self.step:
            raise ValueError(f"earlier names {amount(len(self.earlier), 'steps')} before step {self.step}")
        return self


class EvaluationLine(Line):
    """An evaluation."""

    step: Count
    metrics: dict[str, float]
    back: Count | None = None
    state: dict[str, float] = {}

    @model_validator(mode="after")
    def _goes_back(self) -> Self:
        if self.back is not None and self.back >= self.step:
            raise ValueError(f"back is {self.back}, which is not before step {self.step}")
        return self

    @model_validator(mode="after")
    def _has_accuracy(self) -> Self:
        if "eval_accuracy" not in self.metrics:
            raise ValueError("metrics have no eval_accuracy")
        return self


class AcceptedLine(Line):
    """Hashes of what the run depends on from here on."""

    files: Names
    code: Names
    prompts_hash: MaybeHash = ""


class EndLine(Line):
    """How the run ended."""

    step: Count
    ended: Literal["finished", "stopped early", "interrupted"]


KINDS: dict[str, type[Line]] = {
    "header": HeaderLine,
    "step": StepLine,
    "evaluation": EvaluationLine,
    "settings": Settings,
    "accepted": AcceptedLine,
    "end": EndLine,
}


def fault(kind: Any, payload: Mapping[str, Any], steps: int | None) -> str | None:
    """What is wrong with a line, naming the field; None where nothing is.

    Args:
        kind, payload: what it says it is, and its other fields.
        steps: steps before it; None for the first line, which is the header.
    """
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None or (kind == "header") != (steps is None):
        return f"kind is {kind!r:.40}, and no such line belongs there"
    try:
        model.model_validate(payload)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        found = "" if first["type"] in ("missing", "value_error") else f", found {first['input']!r:.60}"
        return f"{name + ': ' if name else ''}{first['msg'].removeprefix('Value error, ')}{found}"
    if steps is not None and kind in ("step", "evaluation", "end"):
        number = payload["step"]
        if number > steps or (kind == "step" and number < steps):
            return f"step is {number}, after {amount(steps, 'steps')}"
    return None


def sealed(payload: dict[str, Any], previous: str) -> tuple[str, bytes]:
    """A line's check, and the line: these fields, and behind them the check, which covers the line before, too.

    Args:
        payload: the fields, of which none is `check`.
        previous: the check of the line before; empty for the first.
    """
    body = json.dumps(payload, separators=(",", ":"), allow_nan=False)[:-1].encode()
    check = hashlib.blake2b(previous.encode() + body, digest_size=8).hexdigest()
    return check, body + b',"check":"' + check.encode() + b'"}\n'


def verified(line: bytes, previous: str, path: Path, where: str) -> tuple[str, dict[str, Any]]:
    """The check and the other fields of a line as `sealed` makes it, of which `take_kind` has still to see the latter.

    Args:
        line: without its end.
        previous: the check of the line before; empty for the first.
        path, where: the journal, and the place in it, for the message.

    Raises:
        EstuneError: the line is not as it was written, or no fields at all.
    """
    body, _, seal = line.rpartition(b',"check":"')
    check = hashlib.blake2b(previous.encode() + body, digest_size=8).hexdigest()
    if seal != check.encode() + b'"}':
        raise EstuneError(f"{path}: damaged at {where}: the line does not match its checksum; restore it from a copy")
    try:
        payload: dict[str, Any] = json.loads(line)
        payload.pop("check")
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise EstuneError(f"{path}: {where} is no line that estune wrote; restore it from a copy") from error
    return check, payload


def take_kind(path: Path, where: str, payload: dict[str, Any], steps: int | None) -> str:
    """Take the kind out of a line's fields, and see that the others are what a line of that kind holds.

    Raises:
        EstuneError: naming the line and the field.
    """
    kind = payload.pop("kind", None)
    why = fault(kind, payload, steps)
    if why is not None:
        raise EstuneError(f"{path}: {where}: {why}: no line that estune wrote; restore it from a copy")
    return str(kind)
