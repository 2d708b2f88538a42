"""What a journal records: where a run began, its steps and its evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from estune.es.earlier import scaled
from estune.es.strategy import Member, Moments, Update
from estune.noise.reference import NOISE_VERSION
from estune.weights.policies import POLICIES, TYPE_NAMES, NoiseMode, PolicyName, Rounding, Rule
from estune.weights.tensors import PACKED

FORMAT = 2
BEST_BY = ("eval_accuracy", "eval_reward")
"""What evaluations are judged by, the first first; of a metric with `-` before its name, less is better."""
SEARCH = "parameter search"
"""The task of a journal whose steps an outer program takes: it writes no checkpoint when it ends."""


def rank(metrics: Mapping[str, float], best_by: Sequence[str] = BEST_BY) -> tuple[float, ...]:
    """What an evaluation is judged by: the better one's is larger. A metric that is missing, or NaN, is worst."""
    signs = [-1.0 if name.startswith("-") else 1.0 for name in best_by]
    values = [metrics.get(name.removeprefix("-"), math.nan) for name in best_by]
    return tuple(-math.inf if math.isnan(v) else sign * v for sign, v in zip(signs, values, strict=True))


@dataclass(frozen=True)
class Header:
    """What a run started from."""

    model: str  # as the user named it
    base_hash: str  # content hash of the base checkpoint
    policy: PolicyName
    rounding: Rounding
    noise: NoiseMode
    dtype: str  # of the base weights
    live_dtype: str  # of the weights that generate
    tensors: dict[str, list[str]]  # trained tensors of the checkpoint, each with the names tied to it
    fingerprint: str  # before the first step
    task: str  # its name
    data_hash: str  # of the training and the evaluation set
    config: dict[str, Any]
    packages: dict[str, str]
    created: str  # ISO 8601
    ancestors: list[str] = field(default_factory=list)  # last checks of the journals it goes on from, oldest first
    files: dict[str, str] = field(default_factory=dict)  # hashes of the base model's configuration, tokenizer, ...
    code: dict[str, str] = field(default_factory=dict)  # hashes of the task's file and its reward functions
    best_by: list[str] = field(default_factory=lambda: list(BEST_BY))  # metrics that tell the best evaluation
    place: str = ""  # the run's directory, from the root on
    folder: str = ""  # the directory that the run was begun in, to which paths in its settings are relative
    shares: list[str] | None = None  # accuracies that lie in 0 to 1 by declaration; None: an older version's
    scales: dict[str, float] = field(default_factory=dict)  # factors of tensors' noise, by name; others have 1
    prompts_hash: str = ""  # of the token ids of the first step's prompts and the evaluation set's
    group_size: int = 0  # of integer weights, as in `Grid`; 0 where they are none
    carry_steps: int = 0
    format: int = FORMAT
    noise_version: int = NOISE_VERSION

    @property
    def save_dtype(self) -> str:
        """Type of the run's `best` and `final`, or `packed`; where no journal says it, that of the live weights."""
        said = self.config.get("save_dtype")
        return said if said in (*TYPE_NAMES, PACKED) else self.live_dtype

    @property
    def rule(self) -> Rule:
        """How the base weights are kept and changed."""
        grid = POLICIES[self.policy].grid(self.group_size, self.carry_steps)
        return Rule(self.policy, self.rounding, self.noise, self.dtype, self.scales, grid)


@dataclass(frozen=True)
class StepRecord:
    """One step: who was asked, what they scored, and what was done to the weights."""

    update: Update
    learning_rate: float
    rewards: list[float | None]  # by member; None where it failed
    prompts: list[int]  # rows of the training set
    fingerprint: str  # of the base weights after the step
    metrics: dict[str, float] = field(default_factory=dict)  # for people and plots
    staleness: list[int] = field(default_factory=list)  # by member: updates that its base lacked; empty: none did
    fitness: list[float | None] = field(default_factory=list)  # what members were judged by; empty: their rewards
    state: dict[str, float] = field(default_factory=dict)  # of the strategy after the step, where seeds do not tell it

    @property
    def step(self) -> int:
        """Index of the step, from 0."""
        return self.update.step

    @property
    def sigma(self) -> float:
        """By which its members were perturbed."""
        return self.update.sigma

    def undone(self, fingerprint: str, state: dict[str, float]) -> StepRecord:
        """The step once it is taken back: it changes nothing of the weights, and leaves the strategy in this state."""
        return replace(self, update=self.update.undone(), fingerprint=fingerprint, state=state)

    @property
    def of_members(self) -> list[float | None]:
        """The rewards without the base's, which may take part as a member of sign 0."""
        return [r for member, r in zip(self.update.members, self.rewards, strict=True) if member.sign]


@dataclass(frozen=True)
class EvaluationRecord:
    """Metrics on the evaluation set with the weights after `step` steps."""

    step: int
    metrics: dict[str, float]
    back: int | None = None  # after how many steps the weights are once more that the run goes on with
    state: dict[str, float] = field(default_factory=dict)  # of the strategy then

    @property
    def undone(self) -> range:
        """Indices of the steps that it takes back."""
        return range(self.step if self.back is None else self.back, self.step)


def encoded_evaluation(record: EvaluationRecord) -> dict[str, Any]:
    """The fields of an evaluation's line."""
    back = {} if record.back is None else {"back": record.back, "state": record.state}
    return {"step": record.step, "metrics": record.metrics, **back}


def encoded(record: StepRecord) -> dict[str, Any]:
    """The fields of a step's line."""
    update = record.update
    return {
        "step": update.step,
        "seeds": [f"{m.seed:016x}" for m in update.members],
        "signs": [m.sign for m in update.members],
        "rewards": record.rewards,
        "coefficients": update.coefficients,
        "decay": update.decay,
        "rounding_seed": f"{update.rounding_seed:016x}",
        "sigma": record.sigma,
        "learning_rate": record.learning_rate,
        "prompts": record.prompts,
        "fingerprint": record.fingerprint,
        "metrics": record.metrics,
        **({"staleness": record.staleness} if any(record.staleness) else {}),
        **({"earlier": update.factors} if update.factors else {}),
        **{name: value for name in ("anchor", "anchor_l1") if (value := getattr(update, name))},
        **({"moments": list(astuple(update.moments))} if update.moments else {}),
        **({"fitness": record.fitness} if record.fitness else {}),
        **({"state": record.state} if record.state else {}),
    }


def decoded(payload: dict[str, Any], before: Sequence[StepRecord]) -> StepRecord:
    """The step that a line's fields stand for; `before` are all steps before it, in which its earlier terms are."""
    members = tuple(Member(int(s, 16), sign) for s, sign in zip(payload["seeds"], payload["signs"], strict=True))
    factors = payload.get("earlier", [])
    update = Update(
        payload["step"],
        members,
        tuple(payload["coefficients"]),
        payload["decay"],
        int(payload["rounding_seed"], 16),
        scaled((record.update.pairs for record in reversed(before)), factors),
        tuple(factors),
        payload.get("anchor", 0.0),
        payload.get("anchor_l1", 0.0),
        Moments(*payload["moments"]) if "moments" in payload else None,
        payload["sigma"],
    )
    return StepRecord(
        update,
        payload["learning_rate"],
        payload["rewards"],
        payload["prompts"],
        payload["fingerprint"],
        payload["metrics"],
        payload.get("staleness", []),
        payload.get("fitness", []),
        payload.get("state", {}),
    )
