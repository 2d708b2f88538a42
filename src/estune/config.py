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
from estune.tasks import DEFAULT, KINDS, CountdownConfig, TaskConfig
from estune.tasks.options import refuse_switch

RESUMABLE = (
    *("steps", "model", "workers", "workers_per_gpu", "ray_address", "worker_timeout"),
    *("graders", "reward_timeout", "reward_errors", "max_reward_errors", "report_to"),
)
"""What a run that is resumed may change: its length, where its weights come from and are, what may fail, and who is
told."""
EMBEDDED_SETTINGS = Path(__file__).parent / "models" / "tiny" / "estune.yaml"


def _names(value: Any) -> Any:
    """A list as TRL's users write it too: `tensorboard`, `none`, or names with commas between."""
    if isinstance(value, str):
        value = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    return [] if value == ["none"] else value


Trackers = Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(_names)]


class Config(BaseModel):
    """All settings of `estune train`. Every field is a command-line option of the same name."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    model: str = Field("tiny", description="the embedded model (tiny), a checkpoint directory or a hub id")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="what generates")
    start_from: Path | None = Field(
        None, description="a run to go on from, over the same model: its journal is replayed, then comes this run's"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the weights that generate; auto is float32 on a CPU, else the checkpoint's"
    )
    device: str = Field("auto", description="where the model runs: cuda, cuda:1, cpu; auto is CUDA where there is one")
    task: TaskConfig = Field(
        default_factory=CountdownConfig, description="what to learn (`estune tasks`); its options are task.NAME"
    )
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

    workers: int | None = Field(
        None, ge=1, description="engines on several GPUs or machines, as Ray actors; this machine's, if not given"
    )
    workers_per_gpu: int = Field(1, ge=1, description="workers that share a GPU, which hides what a token costs each")
    gpus_per_worker: int = Field(
        1, ge=1, description="GPUs of one engine; vLLM splits every matrix over them (tensor parallelism)"
    )
    ray_address: str | None = Field(
        None, description="a running Ray cluster for the workers, HOST:PORT or auto; a private one if not given"
    )
    worker_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds after which a worker that does not answer is replaced; ten times what is usual, at least "
        "60, if not given",
    )
    vllm_gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="part of a GPU's memory for vLLM; what the base leaves, if not given"
    )
    vllm_max_model_length: int | None = Field(
        None, ge=2, description="most tokens of a prompt and its completion with vLLM; the model's own if not given"
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

    graders: int | None = Field(
        None,
        ge=1,
        description="processes for rewards that run in one of their own; one a core, at most 8, if not given",
    )
    reward_timeout: float = Field(5.0, gt=0, description="seconds for one completion there, unless the reward says")
    reward_errors: Literal["raise", "exclude"] = Field(
        "raise", description="where a reward raises: end the run, or leave the completion out and count it"
    )
    max_reward_errors: int = Field(100, ge=0, description="failed calls left out so before the run ends after all")

    eval_steps: int = Field(10, ge=0, description="steps between evaluations; 0 evaluates at the start and the end")
    eval_samples: int = Field(
        1, ge=1, description="completions of each held-out prompt; of several, pass@k and mean@k are told"
    )
    eval_temperature: float | None = Field(
        None, ge=0, description="temperature of evaluations; that of training if not given"
    )
    watch: Annotated[list[TaskConfig], BeforeValidator(_names)] = Field(
        [], description="further tasks to evaluate on, with commas between: what is forgotten on the way shows"
    )
    compare_with_base: bool = Field(
        True, description="at evaluations, tell KL divergence from the base model and norm of the change of weights"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="evaluations without a new best before stopping"
    )
    save_steps: int = Field(0, ge=0, description="steps between checkpoints, which make resuming faster; 0 saves none")
    log_completions: int = Field(1, ge=0, description="members whose completions are kept each step, as parquet")
    report_to: Trackers = Field(
        ["tensorboard"], description="trackers: tensorboard, wandb, trackio, with commas between; none for none"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_settings_of_the_embedded_model(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("model", "tiny") != "tiny":
            return values
        return merge(embedded_settings(_task_name(values.get("task"))), dict(values))

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_switch(cls, info.field_name or "", value)
        return value

    @model_validator(mode="after")
    def _check_engines(self) -> Config:
        if self.weights == "inplace" and self.workers:
            raise ValueError("weights=inplace holds one set of weights, in this process: leave out workers")
        if (self.workers or self.engine == "vllm") and (self.replicas or 1) > 1:
            raise ValueError("replicas are processes of this machine's transformers engine: give workers instead")
        if self.gpus_per_worker > 1 and self.engine != "vllm":
            raise ValueError("gpus_per_worker splits a model over GPUs, which engine=vllm does: set it")
        if self.gpus_per_worker > 1 and self.workers_per_gpu > 1:
            raise ValueError("gpus_per_worker and workers_per_gpu cannot both be more than 1")
        if not self.workers and (self.workers_per_gpu > 1 or self.ray_address or self.worker_timeout):
            raise ValueError(
                "workers_per_gpu, ray_address and worker_timeout are about workers: say how many, workers=8"
            )
        if self.engine != "vllm" and (self.vllm_gpu_memory_utilization or self.vllm_max_model_length):
            raise ValueError("vllm_gpu_memory_utilization and vllm_max_model_length are about engine=vllm: set it")
        return self

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.mirrored and self.population % 2:
            raise ValueError(f"population {self.population} is odd, and mirrored members come in pairs")
        if self.weights == "inplace" and (self.replicas or 1) > 1:
            raise ValueError("weights=inplace holds one set of weights: replicas must be 1")
        if self.weights == "inplace" and self.base_device == "host":
            raise ValueError("weights=inplace keeps nothing that base_device=host could hold: leave out one")
        if self.eval_samples > 1 and not (self.temperature if self.eval_temperature is None else self.eval_temperature):
            raise ValueError("eval_samples draws several completions of a prompt: give eval_temperature above 0")
        watched = [task.name for task in self.watch]
        double = next((name for name in watched if watched.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"watch: two tasks are called {double}; give one of them the data of both (eval_data=A,B)")
        stages = getattr(self.task, "stages", [])
        if not self.eval_steps and any(s.until_accuracy and s.until_step is None for s in stages[:-1]):
            raise ValueError("a stage ends by accuracy, and eval_steps 0 makes no evaluation on the way")
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
        values = tomllib.loads(file.read_text()) if file.suffix == ".toml" else yaml.safe_load(file.read_text())
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise EstuneError(f"config {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise EstuneError(f"config {file} holds {type(values).__name__}, not settings: write one `key: value` a line")
    return values


def _complaint(error: Any, source: str) -> str:
    # Of several kinds of options, pydantic puts between which it tried, in angle brackets.
    parts = [str(part) for part in error["loc"]]
    path = [part for part in parts if not part.startswith("<")]
    where = ".".join(path)
    if error["type"] != "extra_forbidden":
        found = f", found {error['input']!r}" if where and not isinstance(error["input"], dict) else ""
        return f"{source}: {where + ': ' if where else ''}{error['msg'].removeprefix('Value error, ')}{found}"
    *section, key = path
    tried = parts[-2].strip("<>") if len(parts) > 1 else ""
    model: type[BaseModel] | None = KINDS.get(tried) or (None if section else Config)
    known = model.model_fields if model else {}
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {'.'.join([*section, near[0]])}?" if near else "see `estune train --help`"
    return f"{source}: unknown setting {where}; {hint}"
