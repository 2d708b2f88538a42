"""Settings of an `ESTrainer`: estune's own, and those of TRL's `GRPOConfig` that mean something here.

The names are those of TRL 1.16 and of transformers' `TrainingArguments`. Neither is imported, nor torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from estune.config import Config, parse
from estune.config.names import MEANINGLESS, RENAMED, hint
from estune.errors import EstuneError
from estune.es.rate import Rate

log = logging.getLogger(__name__)

GRADIENT_RATE = 0.01
"""A learning rate below this share of sigma is a gradient's: with it thousands of steps would change no completion."""

TAKEN = {
    name: RENAMED[name]
    for name in ("max_completion_length", "vllm_tensor_parallel_size", "num_generations_eval", "alpha")
}
"""Names for settings of ours. `alpha` is taken as it is given."""

# Switches that stand for values of settings.
_SWITCHES = {
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "use_cpu": ("device", "cpu"),
    "use_vllm": ("engine", "vllm"),
}

# What `ESTrainer` and callbacks read, with its default.
OWN: dict[str, Any] = {
    "max_steps": -1,
    "num_train_epochs": None,
    "eval_strategy": None,
    "save_strategy": None,
    "save_total_limit": None,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_first_step": False,
    "bf16": None,
    "fp16": False,
    "use_cpu": False,
    "use_vllm": False,
    "model_init_kwargs": None,
    "reward_weights": None,
    "run_name": None,
    "disable_tqdm": False,
    "resume_from_checkpoint": None,
    "load_best_model_at_end": False,
    "metric_for_best_model": "reward",
    "greater_is_better": True,
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_token": None,
    "hub_private_repo": None,
    "hub_revision": None,
}

# What would change the run but is not supported, with the value that asks for nothing.
MISSING: dict[str, Any] = {
    "generation_kwargs": None,
    "lr_scheduler_kwargs": None,
    "mask_truncated_completions": False,
    "max_tool_calling_iterations": None,
    "min_p": None,
    "multi_objective_aggregation": "sum_then_normalize",
    "repetition_penalty": 1.0,
    "vllm_mode": "colocate",
    "vllm_structured_outputs_regex": None,
}

# Ways to load a model that change none of its weights.
_LOADING = ("attn_implementation", "device_map", "low_cpu_mem_usage", "use_cache")


class ESConfig:
    """Settings by keyword: every field of `Config` but `model` and `task`, and the names of TRL's `GRPOConfig`.

    The attribute of a known name is what was given, else its default, or None if it has no meaning here.

    Args:
        output_dir: directory of the run; `runs/REWARD-MODEL-TIME` by default.
        settings: all others. `alpha` is the learning rate as estune means it, however small.

    Raises:
        EstuneError: for an unknown name, or a value that estune cannot follow.
    """

    output_dir: Any
    eval_strategy: Any

    def __init__(self, output_dir: str | Path | None = None, **settings: Any) -> None:
        if output_dir is not None:
            settings["output_dir"] = output_dir
        # transformers' strategies and schedules may come as enumerations
        self._given = {name: getattr(value, "value", value) for name, value in settings.items()}
        for name, value in self._given.items():
            _check(name, value)
        self._refuse_doubles()
        for name, chosen in (("eval_strategy", _EVERY), ("logging_strategy", _EVERY), ("save_strategy", _SAVES)):
            if self._given.get(name) not in (None, *chosen):
                raise EstuneError(f"ESConfig: {name} is one of {', '.join(chosen)}, found {self._given[name]!r}")
        if self.bf16 and self.fp16:
            raise EstuneError("ESConfig: bf16 and fp16 are both set; weights generate in one type: leave out one")
        parse({**self.settings(), "model": "any"}, "ESConfig")  # what is wrong for every model is said here

    @property
    def best_by(self) -> list[str]:
        """The metric that tells which evaluation is the best, as `Trainer` takes it."""
        name = self.metric_for_best_model
        sign = "" if self.greater_is_better else "-"
        return [f"{sign}{name if name.startswith('eval_') else f'eval_{name}'}"]

    def __getattr__(self, name: str) -> Any:
        """The value that was given under this name, or its default."""
        if not name.startswith("_"):
            if name in self._given:
                return self._given[name]
            if name in OWN:
                return OWN[name]
            if name in Config.model_fields:
                return Config.model_fields[name].get_default(call_default_factory=True)
            if name in MEANINGLESS or name in MISSING or name in TAKEN:
                return None
        raise AttributeError(f"ESConfig has no setting {name!r}")

    def __repr__(self) -> str:
        return f"ESConfig({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"

    def to_dict(self) -> dict[str, Any]:
        """The settings that were given, by name."""
        return dict(self._given)

    def build(self, model: str, rows: int) -> Config:
        """The settings of a run. A warning, in one line, says what is not done as it was asked for.

        Args:
            model: what `Config.model` takes.
            rows: size of the training set, by which epochs become steps.

        Raises:
            EstuneError: for a bad value.
        """
        values = {**self.settings(), "model": model}
        config = parse(values, "ESConfig")
        self._warn(config)
        if self._usual_rate(config):
            values.pop("learning_rate")
        epoch = math.ceil(rows / min(rows, config.prompts_per_step))
        if self.max_steps > 0:
            values["steps"] = self.max_steps
        elif self.num_train_epochs is not None:
            values["steps"] = math.ceil(self.num_train_epochs * rows / min(rows, config.prompts_per_step))
        steps = values.get("steps", config.steps)
        for kind in ("eval", "save"):
            every = f"{kind}_steps"
            strategy = self._given.get(f"{kind}_strategy")
            if strategy == "epoch":
                values[every] = epoch
            elif strategy in ("no", "best"):
                values[every] = 0
            elif (share := self._given.get(every)) is not None and 0 < share < 1:
                values[every] = math.ceil(share * steps)
            elif strategy == "steps" and kind == "save":
                values.setdefault(every, 500)  # transformers' default
        return parse(values, "ESConfig")

    def settings(self) -> dict[str, Any]:
        """The settings that do not depend on the data, under the names of `Config`."""
        values = {TAKEN.get(name, name): value for name, value in self._given.items() if value is not None}
        values = {name: value for name, value in values.items() if name in Config.model_fields}
        for every in ("eval_steps", "save_steps"):
            value = values.get(every, 0)
            if value is None or 0 < value < 1:  # a share of the run's steps
                values.pop(every)
        for name, (key, chosen) in _SWITCHES.items():
            if self._given.get(name):
                values[key] = chosen
        if self._given.get("use_vllm") is False:
            values.setdefault("engine", "transformers")
        if dtype := _loading(self.model_init_kwargs or {}).get("dtype"):
            values.setdefault("dtype", str(dtype).removeprefix("torch."))
        if (self.model_init_kwargs or {}).get("trust_remote_code"):
            values.setdefault("trust_remote_code", True)
        if isinstance(values.get("log_completions"), bool):
            values["log_completions"] = int(values["log_completions"])
        if values.get("report_to") in ("all", ["all"]):
            values["report_to"] = ["tensorboard"]
        return {name: value for name, value in values.items() if value is not None}

    def _refuse_doubles(self) -> None:
        """Refuse two names for one setting, as nobody could tell which of them counts."""
        names: dict[str, str] = {}
        for name in (name for name, value in self._given.items() if value is not None):
            own = "steps" if name == "max_steps" and self.max_steps > 0 else TAKEN.get(name, name)
            if own in names:
                raise EstuneError(
                    f"ESConfig: {names[own]} and {name} are both given, and are one setting: leave out one"
                )
            names[own] = name
        for name, (key, chosen) in _SWITCHES.items():
            other = self._given.get(key)
            if self._given.get(name) and str(other).removeprefix("torch.") not in ("None", "auto", chosen):
                raise EstuneError(f"ESConfig: {name}=True is {key}={chosen!r}, and {key} is {other!r}: leave out one")

    def _usual_rate(self, config: Config) -> bool:
        """Whether the learning rate that was given is a gradient's, so that the default is used instead."""
        rate = config.learning_rate
        return "alpha" not in self._given and isinstance(rate, float) and 0 < rate < GRADIENT_RATE * config.sigma

    def _warn(self, config: Config) -> None:
        notes = []
        if unused := [name for name in self._given if name in MEANINGLESS]:
            notes.append(f"{', '.join(unused)}: no meaning for Evolution Strategies, not used")
        if self._usual_rate(config):
            rate = config.learning_rate
            notes.append(
                f"learning_rate {rate} is a gradient's, and would train nothing at sigma {config.sigma:g}: "
                f"{Rate.default(config.population)} is used; insist with alpha={rate}"
            )
        if self.temperature:
            notes.append(
                f"temperature {self.temperature:g}: completions are sampled, which adds noise to rewards and which "
                "Evolution Strategies do not need; leave it out to decode greedily"
            )
        if notes:
            log.warning("ESConfig: %s", "; ".join(notes))


_EVERY = ("no", "steps", "epoch")
_SAVES = ("no", "steps", "epoch", "best")


def _check(name: str, value: Any) -> None:
    """Refuse an unknown name, and a value that would silently mean something else."""
    if RENAMED.get(name, name).partition(".")[0] in ("model", "task"):
        raise EstuneError(f"ESConfig: {name} is no setting here; ESTrainer takes model, reward_funcs and data itself")
    if name in MISSING:
        if value not in (MISSING[name], None, {}):
            raise EstuneError(f"ESConfig: estune cannot do {name}={value!r}; leave it out")
    elif name == "model_init_kwargs":
        other = next((key for key in _loading(value or {}) if key not in ("dtype", "trust_remote_code")), None)
        if other is not None:
            raise EstuneError(f"ESConfig: estune cannot load a model with {other}; leave it out of model_init_kwargs")
    elif name not in {*Config.model_fields, *OWN, *TAKEN, *MEANINGLESS}:
        taken = {*Config.model_fields, *OWN, *TAKEN, *MISSING}
        raise EstuneError(f"ESConfig: unknown setting {name}; {hint(name, taken, 'see docs/trl.md')}")


def _loading(given: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `model_init_kwargs` that matters, with the type under its newer name."""
    return {"dtype" if key == "torch_dtype" else key: value for key, value in given.items() if key not in _LOADING}
