"""Settings of an `ESTrainer`: estune's own, and those of TRL's `GRPOConfig` that mean something here.

The names are those of TRL 1.16 and of transformers' `TrainingArguments`. Neither is imported, nor torch.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from estune.config import Config, parse
from estune.errors import EstuneError

log = logging.getLogger(__name__)

GRADIENT_RATE = 0.01
"""A learning rate below this part of sigma is a gradient's: with it thousands of steps would move no completion."""

_RENAMED = {
    "max_completion_length": "max_new_tokens",
    "vllm_tensor_parallel_size": "gpus_per_worker",
    "num_generations_eval": "eval_samples",
    "alpha": "learning_rate",  # taken as it is given
}

# Switches that are values of settings.
_SWITCHES = {
    "bf16": ("dtype", "bfloat16"),
    "fp16": ("dtype", "float16"),
    "use_cpu": ("device", "cpu"),
    "use_vllm": ("engine", "vllm"),
}

# What `ESTrainer` and callbacks read, with what it is if not given.
_OWN: dict[str, Any] = {
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

# What would change the run but cannot be done, with the value that asks for nothing.
_MISSING: dict[str, Any] = {
    "generation_kwargs": None,
    "lr_scheduler_kwargs": None,
    "mask_truncated_completions": False,
    "max_tool_calling_iterations": None,
    "min_p": None,
    "multi_objective_aggregation": "sum_then_normalize",
    "repetition_penalty": 1.0,
    "trust_remote_code": False,
    "vllm_mode": "colocate",
    "vllm_structured_outputs_regex": None,
}

# The rest: gradients, their optimizers and their parallelism, GRPO's loss, and details of transformers' loop.
MEANINGLESS = frozenset(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics beta bf16_full_eval cache_implementation
    cast_lm_head_to_fp32 data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed
    delta disable_dropout do_eval do_predict do_train ds3_gather_for_generation enable_jit_checkpoint entropy_coef
    entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target epsilon epsilon_high eval_accumulation_steps
    eval_delay eval_do_concat_batches eval_use_gather_object fp16_full_eval fsdp fsdp_config full_determinism
    generation_batch_size gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    hub_always_push hub_strategy ignore_data_skip importance_sampling_level include_for_metrics
    include_num_input_tokens_seen label_names label_smoothing_factor length_column_name liger_kernel_config local_rank
    log_completions_hub_repo log_level log_level_replica log_multimodal log_on_each_node log_unique_prompts
    logging_nan_inf_filter loss_type max_grad_norm neftune_noise_alpha num_completions_to_print num_generations
    num_iterations off_policy_mask_threshold optim optim_args optim_target_modules
    pad_to_multiple_of parallelism_config per_device_eval_batch_size per_device_train_batch_size prediction_loss_only
    project ref_model_mixup_alpha ref_model_sync_steps remove_unused_columns restore_callback_states_from_checkpoint
    router_aux_loss_coef sapo_temperature_neg sapo_temperature_pos save_on_each_node save_only_model scale_rewards
    shuffle_dataset skip_memory_metrics steps_per_generation sync_ref_model tf32 top_entropy_quantile torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
    trackio_static_space_id train_sampling_strategy transformers_continuous_batching_config use_adaptive_entropy
    use_bias_correction_kl use_cache use_liger_kernel use_transformers_continuous_batching use_transformers_paged
    vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos vllm_enable_sleep_mode vllm_group_port
    vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_model_impl vllm_server_base_url
    vllm_server_host vllm_server_port vllm_server_timeout warmup_ratio warmup_steps
    """.split()  # noqa: SIM905
)
"""Names of `GRPOConfig` that are accepted and not used."""

# Ways to load a model that change none of its weights.
_LOADING = ("attn_implementation", "device_map", "low_cpu_mem_usage", "use_cache")


class ESConfig:
    """Settings by keyword: every field of `Config` but `model` and `task`, and the names of TRL's `GRPOConfig`.

    An attribute of every known name is what was given, else the default, or None for what has no meaning.

    Args:
        output_dir: directory of the run; `runs/REWARD-MODEL-TIME` if not given.
        settings: the others. `alpha` is the learning rate as estune means it, however small.

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
        """What was given under this name, or its default."""
        if not name.startswith("_"):
            if name in self._given:
                return self._given[name]
            if name in _OWN:
                return _OWN[name]
            if name in Config.model_fields:
                return Config.model_fields[name].get_default(call_default_factory=True)
            if name in MEANINGLESS or name in _MISSING or name in _RENAMED:
                return None
        raise AttributeError(f"ESConfig has no setting {name!r}")

    def __repr__(self) -> str:
        return f"ESConfig({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"

    def to_dict(self) -> dict[str, Any]:
        """What was given, by name."""
        return dict(self._given)

    def build(self, model: str, rows: int) -> Config:
        """The settings of a run; warns, in one line, of what is not done as it was asked for.

        Args:
            model: what `Config.model` takes.
            rows: size of the training set, by which epochs become steps.

        Raises:
            EstuneError: for a bad value.
        """
        values = {**self.settings(), "model": model}
        config = parse(values, "ESConfig")
        self._warn(config.sigma)
        if self._usual_rate(config.sigma):
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
        """What does not depend on the data, under the names of `Config`."""
        values = {_RENAMED.get(name, name): value for name, value in self._given.items() if value is not None}
        values = {name: value for name, value in values.items() if name in Config.model_fields}
        for every in ("eval_steps", "save_steps"):
            value = values.get(every, 0)
            if value is None or 0 < value < 1:  # a share of the run's steps
                values.pop(every)
        for name, (key, chosen) in _SWITCHES.items():
            if self._given.get(name):
                values[key] = chosen
        if dtype := _loading(self.model_init_kwargs or {}).get("dtype"):
            values.setdefault("dtype", str(dtype).removeprefix("torch."))
        if isinstance(values.get("log_completions"), bool):
            values["log_completions"] = int(values["log_completions"])
        if values.get("report_to") in ("all", ["all"]):
            values["report_to"] = ["tensorboard"]
        return {name: value for name, value in values.items() if value is not None}

    def _refuse_doubles(self) -> None:
        """Refuse two names for one setting: which of them counts, nobody could tell."""
        names: dict[str, str] = {}
        for name in (name for name, value in self._given.items() if value is not None):
            own = "steps" if name == "max_steps" and self.max_steps > 0 else _RENAMED.get(name, name)
            if own in names:
                raise EstuneError(
                    f"ESConfig: {names[own]} and {name} are both given, and are one setting: leave out one"
                )
            names[own] = name
        for name, (key, chosen) in _SWITCHES.items():
            other = self._given.get(key)
            if self._given.get(name) and str(other).removeprefix("torch.") not in ("None", "auto", chosen):
                raise EstuneError(f"ESConfig: {name}=True is {key}={chosen!r}, and {key} is {other!r}: leave out one")

    def _usual_rate(self, sigma: float) -> bool:
        """Whether the learning rate that was given is a gradient's, so that sigma / 2 is used instead."""
        rate = self._given.get("learning_rate")
        return "alpha" not in self._given and rate is not None and 0 < rate < GRADIENT_RATE * sigma

    def _warn(self, sigma: float) -> None:
        notes = []
        if unused := [name for name in self._given if name in MEANINGLESS]:
            notes.append(f"{', '.join(unused)}: no meaning for Evolution Strategies, not used")
        if self._usual_rate(sigma):
            rate = self._given["learning_rate"]
            notes.append(
                f"learning_rate {rate:g} is a gradient's, and would train nothing at sigma {sigma:g}: sigma / 2 is "
                f"used; insist with alpha={rate:g}"
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
    """Refuse a name that nobody knows, and a value that would silently be something else."""
    if name in ("model", "task"):
        raise EstuneError(f"ESConfig: {name} is no setting here; ESTrainer takes model, reward_funcs and data itself")
    if name in _MISSING:
        if value not in (_MISSING[name], None, {}):
            raise EstuneError(f"ESConfig: estune cannot do {name}={value!r}; leave it out")
    elif name == "model_init_kwargs":
        other = next((key for key in _loading(value or {}) if key != "dtype"), None)
        if other is not None:
            raise EstuneError(f"ESConfig: estune cannot load a model with {other}; leave it out of model_init_kwargs")
    elif name not in {*Config.model_fields, *_OWN, *_RENAMED, *MEANINGLESS}:
        near = difflib.get_close_matches(
            name, {*Config.model_fields, *_OWN, *_RENAMED, *_MISSING, *MEANINGLESS}, 1, 0.5
        )
        hint = f"did you mean {near[0]}?" if near else "see docs/trl.md"
        raise EstuneError(f"ESConfig: unknown setting {name}; {hint}")


def _loading(given: Mapping[str, Any]) -> dict[str, Any]:
    """What matters of `model_init_kwargs`, the type under its newer name."""
    return {"dtype" if key == "torch_dtype" else key: value for key, value in given.items() if key not in _LOADING}
