"""The settings in sections, one class each; the longest, `Search`, has a file of its own.

For users they are flat: `Config` is all of them at once. Defaults are those of the paper (arXiv 2509.24372).
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from estune.config.values import Section, count_or_auto, names, template_options, urls, whole
from estune.tasks import CountdownConfig, TaskConfig
from estune.weights.adapters import Adapter
from estune.weights.grid import GroupSize
from estune.weights.policies import POLICIES, DType, PolicyName, Rounding

EngineName = Literal["transformers", "vllm"]
Trackers = Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(names)]


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
    chat_template_kwargs: Annotated[dict[str, JsonValue], BeforeValidator(template_options)] = Field(
        {}, description="what the chat template takes beside messages, as chat_template_kwargs.enable_thinking=false"
    )
    template_date: date | None = Field(
        None, description="the date that a chat template that asks for it is told; the day on which the run begins"
    )
    output_dir: Path | None = Field(None, description="directory of the run; runs/TASK-MODEL-TIME if not given")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the run: perturbations and order of the prompts")


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
    workers_per_gpu: Annotated[int | Literal["auto"], BeforeValidator(count_or_auto)] = Field(
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
    workers_at: Annotated[list[str], BeforeValidator(urls)] = Field(
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
    vllm_max_loras: int | None = Field(
        None,
        ge=1,
        description="members that vLLM generates with at once, a slot each: of an adapter, or by noise of low rank, "
        "where 1 is one by one; as many as fill its batch, at most 32, if not given",
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
        "subtracting the noise again would not give back (exact_inplace), or of the float32 ones the lower half, for "
        "bfloat16 weights (split_master); int8 and int4 make the layers' matrices "
        "integers, train these as they are and keep nothing (experimental)",
    )
    weights_group_size: Annotated[GroupSize, BeforeValidator(whole)] = Field(
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
            raise ValueError(f"weights={self.weights} keeps no base that base_device=host could hold: leave out one")
        return self

    @model_validator(mode="after")
    def _choose_rounding(self) -> Weights:
        if self.weights in ("exact_inplace", "int8", "int4") and "rounding" not in self.model_fields_set:
            self.rounding = "stochastic"  # to nearest, updates much smaller than the paper's would be lost
        return self

    @model_validator(mode="after")
    def _check_integers(self) -> Weights:
        about = next(
            (name for name in ("weights_group_size", "carry_steps", "carry") if name in self.model_fields_set), None
        )
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
    watch: Annotated[list[TaskConfig], BeforeValidator(names)] = Field(
        [], description="further tasks to evaluate on, with commas between: what is forgotten on the way shows"
    )
    compare_with_base: bool = Field(
        True, description="at evaluations, tell KL divergence from the base model and norm of the change of weights"
    )
    stop_on_collapse: bool = Field(
        False,
        description="stop where a run has collapsed instead of only saying so: all members earn the same, completions "
        "are four times as long or short or hardly differ any more, or the model is a nat a token from its base",
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
    save_dtype: Literal["auto", "packed", DType] = Field(
        "auto",
        description="type of the checkpoints `best` and `final`; auto is the base checkpoint's, float32 loses nothing; "
        "packed is for int8 and int4: as these integers (compressed-tensors)",
    )
    log_completions: int = Field(1, ge=0, description="members whose completions are kept each step, as parquet")
    report_to: Trackers = Field(
        ["tensorboard"], description="trackers: tensorboard, wandb, trackio, with commas between; none for none"
    )
