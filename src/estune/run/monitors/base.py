"""What a monitor is told, under the names of transformers' callbacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from estune.engines.progress import Progress

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its completion, for people to read."""

    prompt: str
    completion: str
    reward: float | None


@dataclass(frozen=True)
class Plan:
    """What a run sets out to do."""

    run: Path
    model: str
    parameters: int
    task: str
    steps: int
    first_step: int  # steps that are done; above 0 when a run is resumed
    population: int
    prompts_per_step: int
    prompt_tokens: int  # of a step's prompts, the first step's
    engines: int  # that work side by side
    train_size: int
    eval_size: int
    config: dict[str, Any]
    shares: Collection[str]  # accuracies that are shown in percent
    history: list[Metrics]  # of the steps and evaluations that a resumed run has behind it, in their order


@dataclass(frozen=True)
class Work:
    """Completions that are generated now: a step's, or an evaluation's.

    Attributes:
        name: `members`, `evaluation`, or the name of a task that is watched.
        pieces: members of a step, or batches of an evaluation, that engines take one by one.
        prompt_tokens, completions: of all pieces together.
        places: tokens of all completions if each is as long as it may be.
        engines: that work side by side.
        done: what has been done of it so far; may be asked from any thread.
    """

    name: str
    pieces: int
    prompt_tokens: int
    completions: int
    places: int
    engines: int
    done: Callable[[], Progress]


@dataclass(frozen=True)
class Summary:
    """What a run came to. Metrics are those of the first, the last and the best evaluation, each with its `step`."""

    run: Path
    steps: int
    seconds: float
    before: dict[str, float]
    after: dict[str, float]
    best: dict[str, float]
    ended: str  # "finished", "stopped early" or "interrupted"
    shares: Collection[str] = ()  # as in `Plan`
    go_on: str = ""  # what its user does to go on with the run
    taken_back: int = 0  # steps, by the guard
    back: int = 0  # how often it went back to the best evaluation


Request = Literal["stop", "evaluate", "save"]


class Monitor:
    """Base of all monitors: does nothing. Metrics carry their step under the key `step`."""

    def on_train_begin(self, plan: Plan) -> None:
        """A run begins or goes on."""

    def on_step_begin(self, step: int) -> None:
        """A step begins, the first of a run being 1."""

    def on_generate_begin(self, work: Work) -> None:
        """The completions of a step or of an evaluation are generated from here on."""

    def on_member_end(self, done: int, population: int) -> None:
        """One more member of the step has been graded."""

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        """A step is done and in the journal."""

    def on_evaluate(self, metrics: Metrics, sample: Sample) -> None:
        """The evaluation set has been graded with the base weights."""

    def on_save(self, step: int) -> None:
        """`checkpoint-N` has been written, N being `step`."""

    def requests(self) -> Collection[Request]:
        """What is asked for after a step: to end the run, to evaluate, to write a checkpoint."""
        return ()

    def on_train_end(self, summary: Summary) -> None:
        """The run is over."""

    def close(self) -> None:
        """Release files and the screen, whatever happened."""
