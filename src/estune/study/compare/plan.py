"""What is compared: methods, seeds, learning rates and the budget, as a list of jobs. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from estune.config import Config
from estune.errors import EstuneError

Method = Literal["es", "grpo", "dr_grpo", "dapo", "rloo"]
METHODS: tuple[Method, ...] = ("es", "grpo", "dr_grpo", "dapo", "rloo")
# From rates for models of billions of parameters to rates for very small ones.
RATES = (1e-6, 1e-5, 1e-4, 1e-3)


class Job(BaseModel):
    """One training run with one method.

    `rate` is the learning rate of an RL method, None for ES, whose settings are `config`'s. A `trial` is a run whose
    only use is to choose a rate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    seed: int
    rate: float | None = None
    trial: bool = False

    @property
    def name(self) -> str:
        """Its folder."""
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return f"{self.method}{rate}-seed{self.seed}{'-trial' * self.trial}"


class Plan(BaseModel):
    """A comparison.

    Every run may generate `budget` tokens, end tokens included and prompts not. The step that spends the last of them
    is finished. With `rl_steps`, RL may end before.
    """

    model_config = ConfigDict(extra="forbid")

    methods: list[Method] = Field(default_factory=lambda: list(METHODS), min_length=1)
    budget: int = Field(1_000_000, gt=0)
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    rates: list[float] = Field(default_factory=lambda: list(RATES), min_length=1)
    trial_seed: int = 1000  # of the runs that choose a learning rate
    generations: int = Field(8, ge=2)  # completions of a prompt in a group
    batch: int = Field(256, ge=2)  # completions of an RL step
    micro_batch: int = Field(32, ge=1)  # of them in one backward pass, at most; fewer take less memory, and more time
    rl_temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.0, ge=0)  # weight of the KL penalty
    es_steps: int | None = Field(None, ge=1)  # length of an ES run, for its schedules; without it they are constant
    rl_steps: int | None = Field(None, ge=1)  # most of an RL run, whose answers may become too short to spend a budget
    points: int = Field(0, ge=0)  # of the learning curve, equally many tokens apart; the last one is the run's end
    short_tokens: int | None = Field(None, ge=1)  # an answer of at most as many tokens is short

    def check(self, config: Config) -> None:
        """Refuse settings that cannot be compared.

        Raises:
            EstuneError: settings under which methods would not do the same work.
        """
        if not all(rate > 0 and math.isfinite(rate) for rate in self.rates):
            raise EstuneError(f"rates {', '.join(map(str, self.rates))}: give learning rates above 0")
        if self.batch % self.generations:
            raise EstuneError(f"batch {self.batch} is no multiple of generations {self.generations}: groups are whole")
        for name, values in (("methods", self.methods), ("seeds", self.seeds), ("rates", self.rates)):
            if len(set(values)) < len(values):
                raise EstuneError(f"{name} {', '.join(map(str, values))}: one is given twice")
        if self.trial_seed in self.seeds and self.learns_rate:
            raise EstuneError(f"seed {self.trial_seed} chooses the learning rates: compare on others, or change it")
        if config.engine == "vllm" or config.workers:
            raise EstuneError("compare runs each method in one process: leave out engine and workers")
        if config.adapter is not None:
            raise EstuneError("compare trains the weights themselves: leave out adapter")
        if config.start_from is not None:
            raise EstuneError("compare begins with a model: export the run of start_from, and give that as the model")

    def large_steps(self, config: Config, rows: int) -> list[str]:
        """A sentence for each kind of method that can spend more than the whole budget in one step.

        Args:
            config: the settings.
            rows: of the training set.
        """
        steps = {"es": config.population * min(config.prompts_per_step, rows), "RL": self.batch}
        smaller = {"es": "--population or --prompts_per_step", "RL": "--batch"}
        kinds = dict.fromkeys("es" if method == "es" else "RL" for method in self.methods)
        return [
            f"budget {self.budget:,}: one step of {kind} is {steps[kind]:,} completions, which can take "
            f"{steps[kind] * config.max_new_tokens:,} tokens, and it is finished; give a larger --budget or a smaller "
            f"{smaller[kind]}"
            for kind in kinds
            if steps[kind] * config.max_new_tokens > self.budget
        ]

    @property
    def backward(self) -> int:
        """Completions in one backward pass: the largest part of a batch, of at most `micro_batch`."""
        return max(size for size in range(1, min(self.batch, self.micro_batch) + 1) if self.batch % size == 0)

    @property
    def learns_rate(self) -> bool:
        """Whether there are learning rates to choose from, for a method that has one."""
        return len(self.rates) > 1 and any(method != "es" for method in self.methods)

    def trials(self) -> list[Job]:
        """The runs that choose a learning rate; none if there is no choice."""
        if not self.learns_rate:
            return []
        rl = [method for method in self.methods if method != "es"]
        return [Job(method=m, seed=self.trial_seed, rate=rate, trial=True) for m in rl for rate in self.rates]

    def runs(self, trials: Sequence[dict[str, Any]]) -> list[Job]:
        """The runs that are compared, RL at the best rate of its trials.

        A method is left out if none of its trials came to an end.
        """
        jobs = []
        for method in self.methods:
            rate = None if method == "es" else best_rate(method, self.rates, trials)
            if method == "es" or rate is not None:
                jobs += [Job(method=method, seed=seed, rate=rate) for seed in self.seeds]
        return jobs


def best_rate(method: str, rates: Sequence[float], trials: Sequence[dict[str, Any]]) -> float | None:
    """The rate to compare a method at: the only one, or the best of its trials; None if there is none."""
    if len(rates) == 1:
        return rates[0]
    return best_tried(method, trials)


def best_tried(method: str, results: Sequence[Mapping[str, Any]]) -> float | None:
    """The rate whose trial has the highest reward, which is what it was trained for; None if there is none."""
    done = [r for r in results if r["job"]["method"] == method and r["job"]["trial"] and "accuracy" in r]
    best = max(done, key=lambda r: (r["reward"], r["accuracy"]), default=None)
    return None if best is None else float(best["job"]["rate"])


def at_an_end(job: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rate of a run is the lowest or the highest that was tried, so that others may be better."""
    tried = [r["job"]["rate"] for r in results if r["job"]["trial"] and r["job"]["method"] == job["method"]]
    return len(tried) > 1 and job["rate"] in (min(tried), max(tried))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results so far; a last line that was cut off is left out.

    Raises:
        EstuneError: another line is damaged.
    """
    path = folder / "results.jsonl"
    if not path.is_file():
        return []
    *whole, _ = path.read_text().split("\n")
    results = []
    for number, line in enumerate(whole, 1):
        try:
            results.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise EstuneError(f"{path}:{number} is damaged; take that line out, and its run is made again") from error
    return results
