"""The settings of a run: one flat model, from defaults, a file and overrides. Imports no torch.

Defaults are those of the paper (arXiv 2509.24372). The embedded model is a thousand times smaller than the paper's, and
comes with settings of its own (`models/tiny/estune.yaml`), which stand in for the defaults whenever it is the model.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from estune.errors import EstuneError
from estune.tasks import TaskConfig

EMBEDDED_SETTINGS = Path(__file__).parent / "models" / "tiny" / "estune.yaml"


def _names(value: Any) -> Any:
    """A list as TRL's users write it too: `tensorboard`, `none`, or names with commas between."""
    if isinstance(value, str):
        value = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    return [] if value == ["none"] else value


Trackers = Annotated[list[Literal["tensorboard"]], BeforeValidator(_names)]


class Config(BaseModel):
    """All settings of `estune train`. Every field is a command-line option of the same name."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    model: str = Field("tiny", description="the embedded model (tiny), a checkpoint directory or a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the weights that generate; auto is float32 on a CPU, else the checkpoint's"
    )
    device: str = Field("auto", description="where the model runs: cuda, cuda:1, cpu; auto is CUDA where there is one")
    task: TaskConfig = Field(default_factory=TaskConfig, description="what to learn; its options are task.NAME")
    output_dir: Path | None = Field(None, description="directory of the run; runs/TASK-MODEL-TIME if not given")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the run: perturbations and order of the prompts")

    steps: int = Field(500, ge=0, description="ES steps")
    population: int = Field(30, ge=2, description="members evaluated a step (N)")
    sigma: float = Field(0.001, gt=0, description="standard deviation of the perturbations")
    learning_rate: float | None = Field(
        None, ge=0, description="alpha, 1/sigma digested into it; sigma / 2 if not given"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate over the run: constant, or falling to zero"
    )
    weight_decay: float = Field(0.0, ge=0, description="decay toward zero a step, times the learning rate")
    mirrored: bool = Field(False, description="evaluate each perturbation with both signs")
    noise: Literal["iid", "correlated"] = Field(
        "iid", description="correlated: equal noise for all tensors, as in the authors' first code"
    )

    prompts_per_step: int = Field(
        200, ge=1, description="training prompts a step, the same for all members; drawn afresh from the training set"
    )
    max_new_tokens: int = Field(1024, ge=1, description="longest completion")
    temperature: float = Field(0.0, ge=0, description="0 decodes greedily")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus, when sampling")
    top_k: int = Field(0, ge=0, description="most likely tokens kept, when sampling; 0 keeps all")
    batch_size: int | None = Field(
        None, ge=1, description="prompts decoded at once; by the machine's memory if not given"
    )
    cuda_graphs: bool = Field(
        True, description="on CUDA, replay decoding steps from CUDA graphs, which start all kernels of a step at once"
    )
    replicas: int | None = Field(
        None,
        ge=1,
        description="members evaluated at once, each in a process of its own; by cores, one on CUDA, if not given",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a replica; 1 for a small model or on CUDA, else all cores, if not given"
    )

    weights: Literal["master", "copy", "inplace"] = Field(
        "master", description="what is kept beside the live weights: float32, a copy, or nothing (restores inexactly)"
    )
    base_device: Literal["auto", "device", "host"] = Field(
        "auto",
        description="on CUDA, where that is kept: on the device, or in pinned host memory and streamed; auto is the "
        "device if it takes at most half of the memory that live weights leave there",
    )
    rounding: Literal["nearest", "stochastic"] = Field("nearest", description="of updates to bfloat16 weights")
    train_parameters: str = Field("*", description="shell pattern of the parameters to train")

    eval_steps: int = Field(10, ge=0, description="steps between evaluations; 0 evaluates at the start and the end")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="evaluations without a new best before stopping"
    )
    save_steps: int = Field(0, ge=0, description="steps between checkpoints, which make resuming faster; 0 saves none")
    log_completions: int = Field(1, ge=0, description="members whose completions are kept each step, as parquet")
    report_to: Trackers = Field(["tensorboard"], description="trackers, with commas between; none for none")

    @model_validator(mode="before")
    @classmethod
    def _with_settings_of_the_embedded_model(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("model", "tiny") != "tiny":
            return values
        return merge(yaml.safe_load(EMBEDDED_SETTINGS.read_text()), dict(values))

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        _refuse_switch(cls, info.field_name or "", value)
        if info.field_name == "task" and isinstance(value, Mapping):
            for name, option in value.items():
                _refuse_switch(TaskConfig, name, option)
        return value

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.mirrored and self.population % 2:
            raise ValueError(f"population {self.population} is odd, and mirrored members come in pairs")
        if self.weights == "inplace" and (self.replicas or 1) > 1:
            raise ValueError("weights=inplace holds one set of weights: replicas must be 1")
        if self.weights == "inplace" and self.base_device == "host":
            raise ValueError("weights=inplace keeps nothing that base_device=host could hold: leave out one")
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience counts evaluations, and eval_steps 0 makes none on the way")
        return self


def load(file: Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Settings from a YAML or TOML file and `key=value` overrides; dots reach into sections (`task.eval_size=100`).

    Raises:
        EstuneError: for a file that cannot be read, an unknown key (with the nearest known one) or a bad value.
    """
    return parse(read(file, overrides), str(file) if file else "settings")


def read(file: Path | None = None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What file and overrides say, and nothing else: not yet checked, no defaults.

    An override's value stays text, which the setting's type converts; `null` is None, and a key alone is True.

    Raises:
        EstuneError: for a file that cannot be read or an override without key.
    """
    values = _read(file) if file else {}
    for override in overrides:
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
        if key == "task":  # a bare name is short for {name: ...}
            old, value = _section(old), _section(value)  # noqa: PLW2901
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _refuse_switch(model: type[BaseModel], name: str, value: Any) -> None:
    """Python's booleans are integers, and pydantic takes them for numbers."""
    if isinstance(value, bool) and name in model.model_fields and model.model_fields[name].annotation is not bool:
        raise ValueError(f"{name} is no switch: it needs a value other than true or false")


def _section(task: Any) -> Any:
    return {"name": task} if isinstance(task, str) else task


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise EstuneError(f"config {file}: no such file")
    try:
        values = tomllib.loads(file.read_text()) if file.suffix == ".toml" else yaml.safe_load(file.read_text())
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise EstuneError(f"config {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise EstuneError(f"config {file} holds {type(values).__name__}, not settings: write one `key: value` a line")
    return values


def _complaint(error: Any, source: str) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        found = f", found {error['input']!r}" if where and not isinstance(error["input"], dict) else ""
        return f"{source}: {where + ': ' if where else ''}{error['msg'].removeprefix('Value error, ')}{found}"
    *section, key = (str(part) for part in error["loc"])
    known = TaskConfig.model_fields if section[:1] == ["task"] else Config.model_fields
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {'.'.join([*section, near[0]])}?" if near else "see `estune train --help`"
    return f"{source}: unknown setting {where}; {hint}"
