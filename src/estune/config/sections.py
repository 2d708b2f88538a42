"""The settings in sections, one class each. For users they are flat: `Config` is all of them at once.

Defaults are those of the paper (arXiv 2509.24372).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from estune.es.objective import PerPrompt
from estune.es.schedule import Course
from estune.es.shaping import Shaping
from estune.tasks import CountdownConfig, TaskConfig
from estune.tasks.options import refuse_switch
from estune.weights.adapters import Adapter
from estune.weights.grid import GroupSize
from estune.weights.policies import POLICIES, DType, NoiseMode, PolicyName, Rounding


def _names(value: Any) -> Any:
    """A list as TRL's users write it too: `tensorboard`, `none`, or names with commas between."""
    if isinstance(value, str):
        listed = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        value = [name.strip() for name in listed.split(",") if name.strip()]
    return [] if value == ["none"] else value


def server_url(text: str) -> str:
    """A server's address, without the path under which OpenAI's clients look for it.

    Raises:
        ValueError: it is none, or has a password in it.
    """
    url = text.strip().rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        fine = parts.hostname and parts.port != 0  # asked for, they are looked at
    except ValueError:
        fine = False
    if not fine or not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s?#]*)?", url):
        raise ValueError(f"{text!r} is no address of a server: write http://HOST:PORT, and its key in VLLM_API_KEY")
    return url


def _urls(value: Any) -> list[str]:
    """Addresses of servers.

    Raises:
        ValueError: one is none.
    """
    found = [server_url(str(url)) for url in _names(value) or []]
    if twice := next((url for url in found if found.count(url) > 1), None):
        raise ValueError(f"{twice} stands there twice: each server is one worker")
    return found


def _template_options(value: Any) -> Any:
    """What a chat template takes, as `_json` reads it.

    Raises:
        ValueError: no mapping, or a name that is not the user's to give.
    """
    found = _json(value, '{"enable_thinking": false}')
    if own := sorted(_NOT_FOR_TEMPLATES.intersection(found)):
        raise ValueError(f"{', '.join(own)} cannot be given here: it is what estune itself tells the template")
    return found


def _scales(value: Any) -> Any:
    """Factors of sigma by pattern, as `_json` reads them."""
    return _json(value, '{"*.mlp.*": 0.5}')


def _json(value: Any, example: str) -> Any:
    """A mapping whose texts are read as JSON where that gives something else, as from a command line; or all as JSON.

    Raises:
        ValueError: no mapping.
    """
    value = _number_or_switch(value) if isinstance(value, str) else value
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"write a mapping, such as {example}")
    found = {key: _number_or_switch(item) if isinstance(item, str) else item for key, item in value.items()}
    json.dumps(found, allow_nan=False, default=str)  # what is not finite has no JSON
    return found


def _number_or_switch(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(found, str) else found


def _count_or_auto(value: Any) -> Any:
    """Of a union pydantic would say what is wrong with each of its members."""
    if value == "auto" or (str(value).isdecimal() and int(value) >= 1):
        return value
    raise ValueError("write a number from 1 on, or auto")


def _whole(value: Any) -> Any:
    """A number, where one is written as a text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _bound(value: Any) -> Any:
    """A constraint, without spaces."""
    text = str(value).replace(" ", "")
    if value is not None and not re.fullmatch(r"[^<>=]+(<=|>=)-?\d+(\.\d+)?", text):
        raise ValueError("write METRIC<=NUMBER or METRIC>=NUMBER, such as completions/mean_length<=20")
    return None if value is None else text


_NOT_FOR_TEMPLATES = frozenset(
    ("messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message")
) | {"return_assistant_tokens_mask", "tokenize"}

EngineName = Literal["transformers", "vllm"]
Trackers = Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(_names)]


class Section(BaseModel):
    """Settings that belong together."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_switch(cls, info.field_name or "", value)
        return value


class Run(Section):
    """What is trained, on what, and where the run goes."""

    model: str = Field(
        "tiny",
        description="the embedded model (tiny), a checkpoint directory, a GGUF file, smollm2, or a hub id, NAME or "
        "NAME@REVISION",
    )
    engine: Literal["auto", EngineName] = Field(
        "auto",
        description="what generates; auto is vLLM on CUDA, where it is installed and can train the model, else "
        "transformers",
    )
    trust_remote_code: bool = Field(
        False,
        description="run the code that the model brings with it; read it first: it runs as you, with all you may do",
    )
    start_from: Path | None = Field(
        None, description="a run to go on from, over the same model: its journal is replayed, then comes this run's"
    )
    start_step: int | None = Field(
        None, ge=0, description="from where in `start_from` to go on: after so many of its steps; all by default"
    )
    dtype: Literal["auto", DType] = Field(
        "auto",
        description="type of the weights that generate; auto is the checkpoint's, but on a CPU float32, or bfloat16 "
        "where the checkpoint is and a trial of this model finds it faster",
    )
    device: str = Field(
        "auto", description="where the model runs: cuda, cuda:1, mps, cpu; auto is CUDA where there is one"
    )
    task: TaskConfig = Field(
        default_factory=CountdownConfig, description="what to learn (`estune tasks`); its options are task.NAME"
    )
    chat_template_kwargs: Annotated[dict[str, JsonValue], BeforeValidator(_template_options)] = Field(
        {}, description="what the chat template takes beside messages, as chat_template_kwargs.enable_thinking=false"
    )
    template_date: date | None = Field(
        None, description="the date that a chat template that asks for it is told; the day on which the run begins"
    )
    output_dir: Path | None = Field(None, description="directory of the run; runs/TASK-MODEL-TIME if not given")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the run: perturbations and order of the prompts")


class Search(Section):
    """The strategy."""

    steps: int = Field(500, ge=0, description="ES steps")
    population: int = Field(30, ge=2, description="members evaluated a step (N)")
    sigma: float = Field(0.001, gt=0, description="standard deviation of the perturbations")
    sigma_scheduler_type: Course = Field("constant", description="sigma over the run: constant, or falling")
    min_sigma_rate: float = Field(0.1, gt=0, le=1, description="share of sigma that a falling one ends at")
    sigma_scale: Annotated[dict[str, Annotated[float, Field(gt=0)] | Literal["rms"]], BeforeValidator(_scales)] = Field(
        {},
        description="factors of sigma by shell pattern of parameters' names, of which the first that fits counts: "
        '{"*.mlp.*": 0.5}; rms is a parameter\'s root mean square over that of all. Their updates have them too',
    )
    adapt_sigma: bool = Field(
        False,
        description="one-fifth rule: sigma grows where more than a fifth of the members beat the base, which completes "
        "the step's prompts too, and shrinks where fewer do",
    )
    learning_rate: float | None = Field(
        None,
        ge=0,
        description="alpha, 1/sigma digested into it; half of sigma, and changing with it, if not given",
    )
    lr_scheduler_type: Course = Field("constant", description="learning rate over the run: constant, or falling")
    min_lr_rate: float = Field(0.0, ge=0, le=1, description="share of the learning rate that a falling one ends at")
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises to its full value")
    shaping: Shaping = Field(
        "zscore",
        description="from rewards to weights of members: z-scores (the paper), z-scores of ranks or of winsorized "
        "rewards, equal weights for the best and none for the rest (elite), or the distance from the mean (raw)",
    )
    shaping_share: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="members that are elite; or whose rewards are winsorized, half of them at each end",
    )
    per_prompt: PerPrompt = Field(
        "none",
        description="what is done to a prompt's scores before a member's mean is taken: nothing, the mean over members "
        "taken off (center), and divided by their standard deviation (standardize)",
    )
    prompt_groups: int = Field(
        1, ge=1, description="groups of members, each with prompts_per_step prompts of its own; 1 as in the paper"
    )
    samples_per_prompt: int = Field(1, ge=1, description="completions of each prompt by each member, when sampling")
    best_of: int = Field(
        1, ge=1, description="a prompt's score is the expected best of so many of its samples (pass@k); 1 is their mean"
    )
    reward_quantile: float | None = Field(
        None,
        ge=0,
        le=1,
        description="a member's fitness is this quantile of its prompts' scores; their mean if not given",
    )
    constraint: Annotated[str | None, BeforeValidator(_bound)] = Field(
        None,
        description="a second objective: METRIC<=BOUND or METRIC>=BOUND, of any metric of a step, as "
        "completions/mean_length<=20, kept by a penalty that is learned",
    )
    constraint_rate: float = Field(0.5, gt=0, description="how fast the penalty of the constraint is learned")
    momentum: float = Field(
        0.0, ge=0, lt=1, description="weight of earlier steps in an update, each step back once more; costs their noise"
    )
    momentum_window: int | None = Field(
        None, ge=1, description="earlier steps at most; as far as they count 5%, if not given. 1 reuses the last alone"
    )
    guided_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each perturbation's variance along the last updates (guided ES); costs each member the "
        "noise of all their members",
    )
    guided_window: int = Field(1, ge=1, description="updates along which guided members are perturbed")
    adam: bool = Field(
        False,
        description="scale the update of each weight by moments of all updates so far, as Adam does; with "
        "weights=master, 8 bytes more a weight, and resuming makes all steps again",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment, with adam")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment, with adam")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="decay toward zero a step, times the learning rate; none in a step whose rewards are all equal",
    )
    anchor_decay: float = Field(0.0, ge=0, description="decay toward the base model a step, times the learning rate")
    anchor_l1: float = Field(
        0.0, ge=0, description="how far a weight goes back toward the base model a step, times the learning rate"
    )
    mirrored: bool = Field(False, description="evaluate each perturbation with both signs")
    evaluate_base: bool = Field(
        False, description="the base completes each step's prompts too, as one more member: reward_base"
    )
    guard: float | None = Field(
        None,
        ge=0,
        description="take a step back, and halve the learning rate from there on, where the base then earns less than "
        "before on the step's prompts, by more than so many standard deviations of the members' rewards. The base "
        "completes them before and after, as two more members",
    )
    noise: NoiseMode = Field(
        "iid",
        description="rank1: of a matrix an outer product of two vectors, so that a CPU decodes many members together; "
        "correlated: equal noise for all tensors, as in the authors' first code",
    )

    @property
    def members(self) -> int:
        """Members of a step, with the base where it takes part."""
        return self.population + self.base_takes_part

    @property
    def base_takes_part(self) -> bool:
        """Whether the base completes the prompts of each step, too."""
        return self.evaluate_base or self.adapt_sigma or self.guard is not None

    @model_validator(mode="after")
    def _check_pairs(self) -> Search:
        if self.mirrored and self.population % 2:
            raise ValueError(f"population {self.population} is odd, and mirrored members come in pairs")
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Search:
        size, left = divmod(self.population, self.prompt_groups)
        if left or size < 2 or (self.mirrored and size % 2):
            pairs = ", in pairs" if self.mirrored else ""
            raise ValueError(
                f"population {self.population} makes no {self.prompt_groups} prompt_groups of equal size, of two "
                f"members or more{pairs}"
            )
        if self.prompt_groups > 1 and self.base_takes_part:
            raise ValueError(
                "evaluate_base, adapt_sigma and guard compare the base with members on the same prompts: prompt_groups "
                "must be 1"
            )
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> Search:
        if self.best_of > self.samples_per_prompt:
            raise ValueError(
                f"best_of {self.best_of} of samples_per_prompt {self.samples_per_prompt}: raise the latter"
            )
        return self


class Generation(Section):
    """How completions are drawn."""

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


class Workers(Section):
    """Who evaluates members."""

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
    workers_per_gpu: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = Field(
        1,
        description="workers that share a GPU, which hides what a token costs each; auto is as many, at most 4, as its "
        "memory holds with all prompts at once, and without workers is about replicas",
    )
    max_staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="updates that the weights a member is made from may lack: 1 lets members of the next step begin "
        "while the last of a step are at work; which did depends on time, and the journal tells",
    )
    gpus_per_worker: int = Field(
        1, ge=1, description="GPUs of one engine; vLLM splits every matrix over them (tensor parallelism)"
    )
    ray_address: str | None = Field(
        None, description="a running Ray cluster for the workers, HOST:PORT or auto; a private one if not given"
    )
    workers_at: Annotated[list[str], BeforeValidator(_urls)] = Field(
        [],
        description="vLLM servers anywhere as workers, URLs with commas between, each started with estune as its "
        "plugin; their key in VLLM_API_KEY (docs/scale.md)",
    )
    worker_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds after which a worker, or a replica's process, that does not answer is replaced; ten times "
        "what is usual, at least 60, if not given",
    )
    vllm_gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="part of a GPU's memory for vLLM; what the base leaves, if not given"
    )
    vllm_max_model_length: int | None = Field(
        None,
        ge=2,
        description="most tokens of a prompt and its completion with vLLM; as the run's prompts need them if not given",
    )

    @property
    def sharing(self) -> int:
        """Workers that share a GPU; 1 as long as nobody has looked what `auto` is."""
        return 1 if self.workers_per_gpu == "auto" else self.workers_per_gpu

    @model_validator(mode="after")
    def _check_workers(self) -> Workers:
        if self.gpus_per_worker > 1 and self.sharing > 1:
            raise ValueError("gpus_per_worker and workers_per_gpu cannot both be more than 1")
        if self.workers_per_gpu == "auto" and self.replicas:
            raise ValueError("replicas and workers_per_gpu=auto both say how many share a device: leave out one")
        if self.workers_at and (self.workers or self.replicas or self.sharing > 1 or self.gpus_per_worker > 1):
            raise ValueError(
                "workers_at are servers, each set up where it was started: leave out replicas, workers, "
                "workers_per_gpu and gpus_per_worker"
            )
        if not self.workers and (self.sharing > 1 or self.ray_address):
            raise ValueError("workers_per_gpu and ray_address are about workers: say how many, workers=8")
        return self


class Weights(Section):
    """What is kept beside the live weights, and what of them is trained."""

    weights: PolicyName = Field(
        "master",
        description="what is kept beside the live weights: float32, a copy, nothing (restores inexactly), or what "
        "subtracting the noise again would not give back (exact_inplace); int8 and int4 make the layers' matrices "
        "integers, train these as they are and keep nothing (experimental)",
    )
    group_size: Annotated[GroupSize, BeforeValidator(_whole)] = Field(
        64, description="of int8 and int4: neighbours in a matrix' row that share a scale: 16, 32, 64, 128 or 256"
    )
    carry_steps: int = Field(
        50,
        ge=1,
        description="of int8 and int4: updates over which what rounding cuts off is carried on; then it is dropped. 1 "
        "carries nothing",
    )
    carry: Literal["recompute", "keep"] = Field(
        "recompute",
        description="of int8 and int4: make what is carried on again from its seeds, which takes the noise of half of "
        "carry_steps updates for each, or keep it, 4 bytes more a weight: the same bits",
    )
    base_device: Literal["auto", "device", "host"] = Field(
        "auto",
        description="on CUDA, where that is kept: on the device, or in pinned host memory and streamed; auto is the "
        "device if it takes at most half of the memory that live weights leave there",
    )
    rounding: Rounding = Field(
        "nearest",
        description="of updates to bfloat16 weights and to integers; stochastic with weights=exact_inplace, int8 and "
        "int4, if not given",
    )
    train_parameters: str = Field(
        "auto",
        description="shell patterns of the parameters to train, with commas between them; !PATTERN leaves some out; "
        "auto is all, but of a vision-language model its language model",
    )
    adapter: Adapter | None = Field(
        None, description="a low-rank adapter (LoRA) to train over the model, whose own weights stay as they are"
    )

    @model_validator(mode="after")
    def _check_base(self) -> Weights:
        if not POLICIES[self.weights].keeps_base and self.base_device == "host":
            raise ValueError(f"weights={self.weights} keeps nothing that base_device=host could hold: leave out one")
        return self

    @model_validator(mode="after")
    def _choose_rounding(self) -> Weights:
        if self.weights in ("exact_inplace", "int8", "int4") and "rounding" not in self.model_fields_set:
            self.rounding = "stochastic"  # to nearest, updates much smaller than the paper's would be lost
        return self

    @model_validator(mode="after")
    def _check_integers(self) -> Weights:
        about = next((name for name in ("group_size", "carry_steps", "carry") if name in self.model_fields_set), None)
        if about and not POLICIES[self.weights].bits and getattr(self, about) != type(self).model_fields[about].default:
            raise ValueError(f"{about} is about integer weights: set weights=int8 or weights=int4, or leave it out")
        if POLICIES[self.weights].bits and self.adapter is not None:
            raise ValueError(f"weights={self.weights} trains the model's own matrices as integers: leave out adapter")
        return self


class Grading(Section):
    """How rewards are called."""

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


class Rollouts(Section):
    """Tasks of several turns: what a rollout may take."""

    max_turns: int = Field(32, ge=1, description="answers of the model in one rollout of an environment")
    rollout_timeout: float = Field(600.0, gt=0, description="seconds for one rollout")
    turn_timeout: float = Field(60.0, gt=0, description="seconds for what an environment computes in one turn")
    rollouts_at_once: int | None = Field(
        None, ge=1, description="rollouts side by side on an engine; 256, or four programs a core, if not given"
    )


class Evaluation(Section):
    """When and how the held-out set is evaluated."""

    eval_steps: int = Field(10, ge=0, description="steps between evaluations; 0 evaluates at the start and the end")
    eval_on_start: bool = Field(True, description="evaluate before the first step")
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

    @model_validator(mode="after")
    def _check_evaluations(self) -> Evaluation:
        watched = [task.name for task in self.watch]
        double = next((name for name in watched if watched.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"watch: two tasks are called {double}; give one of them the data of both (eval_data=A,B)")
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience counts evaluations, and eval_steps 0 makes none on the way")
        return self


class Logging(Section):
    """What is kept, and who is told."""

    save_steps: int = Field(0, ge=0, description="steps between checkpoints, which make resuming faster; 0 saves none")
    save_dtype: Literal["auto", DType] = Field(
        "auto",
        description="type of the checkpoints `best` and `final`; auto is the base checkpoint's, float32 loses nothing",
    )
    log_completions: int = Field(1, ge=0, description="members whose completions are kept each step, as parquet")
    report_to: Trackers = Field(
        ["tensorboard"], description="trackers: tensorboard, wandb, trackio, with commas between; none for none"
    )
