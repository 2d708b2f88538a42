"""All settings of a run, from defaults, a file and overrides. Imports no torch.

The embedded model is a thousand times smaller than the paper's, and comes with settings of its own
(`models/tiny/estune.yaml`), which stand in for the defaults whenever it is the model.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from estune.completion import Rendering
from estune.config.names import answer, hint
from estune.config.search import Search
from estune.config.sections import (
    Evaluation,
    Generation,
    Grading,
    Logging,
    Rollouts,
    Run,
    Weights,
    Workers,
)
from estune.config.values import Section
from estune.errors import EstuneError
from estune.tasks import DEFAULT, KINDS
from estune.weights.policies import POLICIES, bits_of

RESUMABLE = (
    *("steps", "model", "trust_remote_code", "workers", "workers_per_gpu", "ray_address", "worker_timeout"),
    *("workers_at", "max_staleness"),
    *("graders", "reward_timeout", "reward_errors", "max_reward_errors", "report_to"),
    *("rollout_timeout", "turn_timeout", "rollouts_at_once", "stop_on_collapse"),
)
"""What a run that is resumed may change: its length, where its weights come from and are, what may fail, who is told,
and whether a collapse ends it."""
_SEE = "see `estune train --help`"
EMBEDDED_SETTINGS = Path(__file__).parents[1] / "models" / "tiny" / "estune.yaml"

SECTIONS: tuple[type[Section], ...] = (
    *(Run, Search, Generation, Workers, Weights, Grading, Rollouts, Evaluation, Logging),
)
"""In the order in which people read them."""


class Config(Logging, Evaluation, Rollouts, Grading, Weights, Workers, Generation, Search, Run):
    """All settings of `estune train`. Every field is a command-line option of the same name.

    Of several bases pydantic takes the last one's fields first, hence their order.
    """

    @property
    def rendering(self) -> Rendering:
        """What chat templates are told."""
        return Rendering(self.template_date, self.chat_template_kwargs)

    @property
    def prompts_of_step(self) -> int:
        """Training prompts of a step, those of all groups of members."""
        return self.prompts_per_step * self.prompt_groups

    @property
    def rows_of_member(self) -> int:
        """Completions of one member in a step, as long as there are training rows enough."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def _about_vllm(self) -> str | None:
        """The first of the settings that are about vLLM alone and are given."""
        names = ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_max_loras")
        return next((name for name in names if getattr(self, name) is not None), None)

    @model_validator(mode="before")
    @classmethod
    def _with_settings_of_the_embedded_model(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("model", "tiny") != "tiny":
            return values
        return merge(embedded_settings(_task_name(values.get("task"))), dict(values))

    @model_validator(mode="after")
    def _check_adapter(self) -> Config:
        if self.adapter is not None and self.workers_at:
            raise ValueError("servers train their model's own weights, no adapter: leave out workers_at or adapter")
        return self

    @model_validator(mode="after")
    def _check_integer_weights(self) -> Config:
        if not POLICIES[self.weights].bits:
            if self.save_dtype == "packed":
                raise ValueError("save_dtype=packed packs integer weights: set weights=int8 or weights=int4")
            return self
        if self.engine == "vllm" or self._about_vllm or self.gpus_per_worker > 1 or self.workers_at:
            raise ValueError(
                f"weights={self.weights} is trained by engine=transformers: leave out workers_at and what is about vLLM"
            )
        self.engine = "transformers"
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"weights={self.weights} has kernels for the CPU alone: set device=cpu")
        if self.noise_mode != "iid" or self.momentum or self.weight_decay or self.sam_rho:
            raise ValueError(
                f"weights={self.weights} carries on what members of a window of updates add, and nothing else: set "
                "noise=iid, and leave out momentum, weight_decay and sam_rho"
            )
        return self

    @model_validator(mode="after")
    def _check_engines(self) -> Config:
        if POLICIES[self.weights].drifts and (self.workers or self.workers_at):
            raise ValueError(f"weights={self.weights} holds one set of weights, in this process: leave out workers")
        if self.workers_at and self.engine == "auto":
            self.engine = "vllm"  # what servers have
        if POLICIES[self.weights].drifts and (self.replicas or 1) > 1:
            raise ValueError(f"weights={self.weights} holds one set of weights: replicas must be 1")
        if self.engine == "auto" and (self._about_vllm or self.gpus_per_worker > 1):
            self.engine = "vllm"  # whose settings these are
        if not POLICIES[self.weights].keeps_base and self.max_staleness:
            raise ValueError(
                f"weights={self.weights} has no base to change while members generate: max_staleness must be 0"
            )
        if (self.workers or self.engine == "vllm") and (self.replicas or 1) > 1:
            raise ValueError("replicas are processes of this machine's transformers engine: give workers instead")
        if self.device.startswith("mps") and (self.workers or self.engine == "vllm"):
            raise ValueError("device=mps trains in this machine's own processes: leave out workers and engine=vllm")
        if self.device.startswith("mps") and not POLICIES[self.weights].keeps_base:
            raise ValueError(f"weights={self.weights} takes kernels that mps has none of: set weights=copy or master")
        if self.gpus_per_worker > 1 and self.engine != "vllm":
            raise ValueError(
                "gpus_per_worker splits a model over GPUs, which engine=vllm does: set it, or leave out engine"
            )
        if self.engine != "vllm" and self._about_vllm:
            raise ValueError(f"{self._about_vllm} is about engine=vllm: set it, or leave out engine")
        if self.vllm_max_model_length is not None and self.vllm_max_model_length <= self.max_new_tokens:
            raise ValueError(
                f"vllm_max_model_length {self.vllm_max_model_length} is to hold a prompt and max_new_tokens "
                f"{self.max_new_tokens}: raise it, lower max_new_tokens, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_going_back(self) -> Config:
        if self.guard is not None and self.max_staleness:
            raise ValueError("guard looks at the weights after each step: max_staleness must be 0")
        if self.back_to_best is not None and not self.eval_steps:
            raise ValueError("back_to_best looks at evaluations, and eval_steps 0 makes none on the way")
        if POLICIES[self.weights].drifts and (self.guard is not None or self.back_to_best is not None):
            raise ValueError("guard and back_to_best take steps back exactly: weights must be another than inplace")
        return self

    @model_validator(mode="after")
    def _check_dtype(self) -> Config:
        why = None if self.dtype == "auto" else POLICIES[self.weights].unfit([self.dtype])
        if why is not None:
            raise ValueError(why)
        if self.adapter is not None and POLICIES[self.weights].unfit(["float32"]) is not None:
            raise ValueError(
                f"weights={self.weights} is for weights in bfloat16, and an adapter's are float32: set "
                "weights=exact_inplace, which there has the same bits, or weights=master"
            )
        return self

    @model_validator(mode="after")
    def _check_search(self) -> Config:
        if self.samples_per_prompt > 1 and not self.temperature:
            raise ValueError(f"samples_per_prompt {self.samples_per_prompt} would be alike: set temperature, 1 say")
        if (self.anchor_decay or self.anchor_l1) and bits_of(self.weights) != "master":
            raise ValueError(f"weights={self.weights} would round anchor_decay and anchor_l1 away: set weights=master")
        if self.adam and (self.weights != "master" or self.momentum or self.workers_at):
            raise ValueError(
                "adam keeps moments beside a float32 base, the first of which is a momentum: weights must be master, "
                "momentum 0, and workers_at empty"
            )
        if self.guided_share and (
            self.adam or self.momentum or self.max_staleness or self.noise_rank or not POLICIES[self.weights].keeps_base
        ):
            raise ValueError(
                "guided_share perturbs members along the last updates, around a base that is kept: weights must be "
                "master or copy, momentum and max_staleness 0, noise iid or correlated, and adam left out"
            )
        return self

    @model_validator(mode="after")
    def _check_sharpness(self) -> Config:
        if not self.sam_rho:
            return self
        given = {
            "momentum": self.momentum,
            "adam": self.adam,
            "guided_share": self.guided_share,
            "adapt_sigma": self.adapt_sigma,
            "guard": self.guard is not None,
            "max_staleness": self.max_staleness,
        }
        other = next((name for name, value in given.items() if value), None)
        if other is not None:
            raise ValueError(f"sam_rho makes of two steps one, the first of which only looks: leave out {other}")
        if self.steps % 2:
            raise ValueError(f"steps {self.steps} would end amid a step of sam_rho, which is two: make it even")
        return self

    @model_validator(mode="after")
    def _check_divergence(self) -> Config:
        elsewhere = self.engine == "vllm" or self.workers_at
        if self.constrains_kl and (elsewhere or self.max_staleness or not POLICIES[self.weights].keeps_base):
            raise ValueError(
                "a constraint on kl puts the base model where a member was, and a kept base back: engine must be "
                "transformers, weights master or copy, max_staleness 0, and workers_at empty"
            )
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Config:
        stages = getattr(self.task, "stages", [])
        if not self.eval_steps and any(s.until_accuracy and s.until_step is None for s in stages[:-1]):
            raise ValueError("a stage ends by accuracy, and eval_steps 0 makes no evaluation on the way")
        return self


def load(file: Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Settings from a YAML or TOML file and `key=value` overrides; dots reach into sections (`task.eval_size=100`).

    Raises:
        EstuneError: for a file that cannot be read, an unknown key (with the nearest known one) or a bad value.
    """
    return parse(read(file, overrides), str(file) if file else "settings")


def read(file: Path | None = None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What file and overrides say, and nothing else: not yet checked, no defaults.

    An override's value stays text, which the setting's type converts; `null` is None, and a key alone is True. A task's
    options may stand before its name.

    Raises:
        EstuneError: for a file that cannot be read or an override without key.
    """
    values = _read(file) if file else {}
    for override in sorted(overrides, key=lambda each: each.partition("=")[0] not in ("task", "task.name")):
        key, separator, text = override.partition("=")
        if not key:
            raise EstuneError(f"override {override!r} is not of the form key=value")
        value: Any = True if not separator else None if text == "null" else text
        for part in reversed(key.replace("-", "_").split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def parse(values: Mapping[str, Any], source: str = "settings") -> Config:
    """Settings from a mapping, every complaint in one `EstuneError`."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise EstuneError("; ".join(_complaint(e, source) for e in error.errors())) from error


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if key == "task":  # a bare name is short for {name: ...}, and another task has other options
            old, value = _section(old), _section(value)  # noqa: PLW2901
            old = old if _task_name(value, None) in (None, _task_name(old)) else None
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def embedded_settings(task: str = DEFAULT) -> dict[str, Any]:
    """The embedded model's settings for a task: those for all, with the task's own on top."""
    settings: dict[str, Any] = yaml.safe_load(EMBEDDED_SETTINGS.read_text())
    own = settings.pop("tasks").get(task, {})
    return merge(settings, {**own, "task": {"name": task, **own.get("task", {})}})


def _section(task: Any) -> Any:
    return {"name": task} if isinstance(task, str) else task


def _task_name(task: Any, default: Any = DEFAULT) -> Any:
    """The name in a task's section, or of its options."""
    task = _section(task)
    return task.get("name", default) if isinstance(task, Mapping) else getattr(task, "name", default)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise EstuneError(f"config {file}: no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    # Beside errors of their own, the readers raise what making a value raises: `!!bool x` is a KeyError.
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise EstuneError(f"config {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise EstuneError(f"config {file} holds {found}, where settings should be: write one `key: value` a line")
    return values


def _complaint(error: Any, source: str) -> str:
    # Of several kinds of options, pydantic puts between which it tried, in angle brackets.
    parts = [str(part) for part in error["loc"]]
    path = [part for part in parts if not part.startswith("<")]
    where = ".".join(path)
    given = error["input"]
    if error["type"] != "extra_forbidden":
        ours = error["type"] == "value_error"  # which says of a section what is wrong in it
        found = f", found {given!r}" if where and not isinstance(given, dict) else ""
        if isinstance(given, dict) and len(path) == 1 and given and not ours:
            found = f", found a section, {where}.{next(iter(given))}"
        return f"{source}: {where + ': ' if where else ''}{error['msg'].removeprefix('Value error, ')}{found}"
    tried = parts[-2].strip("<>") if len(parts) > 1 else ""
    if isinstance(given, Mapping):  # a section of others: what is known of what stands in it
        known = {name: answer(name) for name in _leaves(where, given)}
        if any(known.values()):
            return "; ".join(f"{source}: unknown setting {name}; {said}" for name, said in known.items() if said)
    return f"{source}: unknown setting {where}; {_hint(path, KINDS.get(tried))}"


def _hint(path: list[str], options: type[BaseModel] | None) -> str:
    """What to say of an unknown setting: of the run, or of a task with these options."""
    *section, key = path
    where = ".".join(path)
    if options is not None:
        if key in Config.model_fields:
            return f"it is none of the task's: give {key} itself"
        if other := [name for name, kind in KINDS.items() if key in kind.model_fields]:
            return f"it is an option of {', '.join(other)}"
        return hint(where, options.model_fields, "see `estune settings --task NAME`")
    if section:
        return answer(where) or _SEE
    if any(key.replace("-", "_") in kind.model_fields for kind in KINDS.values()):
        return f"did you mean task.{key.replace('-', '_')}?"
    return hint(key, Config.model_fields, _SEE)


def _leaves(where: str, section: Mapping[str, Any]) -> list[str]:
    """The names of what stands in a section, and in those in it."""
    found = []
    for key, value in section.items():
        name = f"{where}.{key}"
        found += _leaves(name, value) if isinstance(value, Mapping) else [name]
    return found
