"""What other trainers call things, and what stands for them here: the answer to a setting that there is none of.

The names are those of TRL 1.16's `GRPOConfig` and transformers' `TrainingArguments`, with some that these have dropped,
of verl's `ppo_trainer.yaml`, OpenRLHF's and NeMo RL's, of Unsloth's notebooks, of prime-rl's files, of the scripts of
the paper (github.com/VsonicV/es-fine-tuning-paper) and of EGGROLL's, and of other scripts of Evolution Strategies.
Which of them `ESConfig` takes is said in `trl/config.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.8
"""Likeness (`difflib`'s ratio) from which on a name passes for a slip of the pen; one that is less like may mean
something else."""
NO_MEANING = "it has no meaning for Evolution Strategies: leave it out"

_RENAMED = {
    "model": (
        "model_name model_name_or_path model_id model_path model_choice base_model pretrain "
        "actor_rollout_ref.model.path"
    ),
    "task.data": "train_dataset dataset dataset_name train_files train_data data_path dataset_path prompt_data",
    "task.eval_data": "eval_dataset val_files val_data",
    "task.train_size": "max_train_samples num_train_samples n_train train_samples max_samples train_max_samples",
    "task.eval_size": "max_eval_samples num_eval_examples eval_dataset_size val_size n_eval val_max_samples",
    "task.chat": "apply_chat_template",
    "task.split": "dataset_train_split train_split dataset_split",
    "task.eval_split": "dataset_test_split eval_split",
    "task.rewards": "reward_funcs reward_functions reward_function reward_fn custom_reward_function.path",
    "start_from": "checkpoint load_checkpoint load_path load_model from_checkpoint",
    "output_dir": (
        "output_directory experiment_dir default_local_dir save_dir save_path out_dir run_dir checkpoint_dir ckpt_dir"
    ),
    "seed": "global_seed random_seed random_state",
    "steps": (
        "max_steps n_iterations total_training_steps num_steps train_steps iterations num_iters max_iterations "
        "max_iters n_iters n_steps total_steps num_training_steps max_train_steps max_num_steps train_iters"
    ),
    "sigma": (
        "noise_std noise_stddev noise_scale noise_stdev noise_standard_deviation sigma_init init_sigma sigma0 "
        "perturbation_scale perturbation_std perturbation_sigma"
    ),
    "population": "population_size pop_size n_population popsize npop n_pop num_perturbations n_perturbations",
    "learning_rate": "lr alpha step_size actor_learning_rate",
    "lr_scheduler_type": "lr_scheduler lr_schedule warmup_style scheduler_type",
    "mirrored": "antithetic use_antithetic mirrored_sampling",
    "max_new_tokens": (
        "max_completion_length max_response_length response_length max_completion_tokens max_tokens "
        "max_gen_len max_gen_length max_output_tokens generation_length max_generation_length generate_max_len"
    ),
    "prompts_per_step": (
        "prompts_per_batch prompt_batch_size questions_per_step prompts_per_iteration prompts_per_epoch"
    ),
    "batch_size": "mini_batch_size eval_batch_size val_batch_size per_device_eval_batch_size",
    "dtype": "torch_dtype precision model_dtype weight_dtype vllm_dtype",
    "workers": "num_engines n_vllm_engines",
    "max_staleness": (
        "async async_level max_async_level staleness_threshold max_head_offpolicyness max_off_policy_steps max_lag"
    ),
    "gpus_per_worker": (
        "vllm_tensor_parallel_size n_gpu_per_vllm_engine tensor_parallel_size tensor_model_parallel_size tp tp_size "
        "tensor_parallel"
    ),
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_max_model_length": "max_model_len vllm_max_model_len",
    "vllm_max_loras": "max_loras",
    "reward_timeout": "reward_function_timeout",
    "eval_steps": (
        "eval_freq test_freq eval_interval eval_every validate_every evaluate_every test_every evaluation_steps "
        "val_interval validation_interval val_period"
    ),
    "eval_samples": "num_generations_eval",
    "eval_temperature": "actor_rollout_ref.rollout.val_kwargs.temperature",
    "save_steps": "save_freq save_interval checkpoint_interval ckpt.interval save_every save_period checkpoint_every",
    "early_stopping_patience": "patience",
    "shaping": "reward_shaping fitness_shaping",
    "sigma_scheduler_type": "sigma_schedule sigma_scheduler",
    "report_to": "logger logging use_wandb use_tensorboard",
}
RENAMED = {theirs: ours for ours, names in _RENAMED.items() for theirs in names.split()}
"""Names of others for a setting of ours that means the same."""

_ANSWERS = {
    "a step is population members that answer the same prompts_per_step prompts each: set these": (
        "num_generations actor_rollout_ref.rollout.n rollouts_per_example group_size n_samples_per_prompt "
        "per_device_train_batch_size per_gpu_train_batch_size train_batch_size generation_batch_size "
        "rollout_batch_size orchestrator.batch_size examples_per_env examples_per_step num_prompts_per_step "
        "generations_per_prompt num_generations_per_prompt rollouts_per_prompt num_rollouts n_rollouts num_prompts"
    ),
    "a member answers each prompt once: set population; or eval_samples, for completions of each held-out prompt": (
        "n_samples num_samples num_return_sequences"
    ),
    "set task.eval_size for held-out rows, or eval_samples for completions of each": (
        "num_eval_samples eval_num_samples n_eval_samples"
    ),
    "set sigma_scheduler_type and min_sigma_rate": "sigma_decay noise_decay sigma_min sigma_limit",
    "set min_lr_rate: the share of the learning rate that a falling one ends at": "lr_scheduler_kwargs min_lr",
    "set temperature; 0 decodes greedily": "do_sample",
    "set steps: GRPO's updates by one batch have no counterpart": "num_iterations",
    "set steps: each draws prompts_per_step prompts of the training set": (
        "num_train_epochs num_epochs n_epochs epochs total_epochs"
    ),
    "prompts are never cut, and max_new_tokens is the longest completion: leave it out": (
        "max_prompt_length max_seq_length max_seq_len max_length seq_len prompt_length truncation"
    ),
    "set dtype: auto, float32, bfloat16 or float16": "bf16 fp16 fp32 model_init_kwargs",
    "set device: cpu": "use_cpu no_cuda",
    "set engine: vllm": "use_vllm fast_inference vllm",
    "set engine: transformers or vllm": (
        "actor_rollout_ref.rollout.name backend inference_engine inference_backend rollout_engine engine_type sglang"
    ),
    "set CUDA_VISIBLE_DEVICES in the environment, and workers": (
        "cuda_devices cuda_visible_devices use_gpu use_gpus gpu gpus gpu_ids n_gpus n_gpus_per_node num_gpus "
        "num_gpus_per_node gpus_per_node"
    ),
    "set adapter.rank: an adapter is trained then, in place of all weights": (
        "use_peft peft_config lora lora_rank lora_r max_lora_rank"
    ),
    "set adapter.alpha": "lora_alpha",
    "set adapter.target": "target_modules lora_target_modules lora_target",
    "an adapter is trained without dropout: leave it out": "lora_dropout",
    "train_parameters names the parameters to train: leave it out": "freeze_nonlora",
    "all weights are trained: leave it out": "full_finetuning",
    "weights that are trained are not quantised: leave it out": (
        "load_in_4bit load_in_8bit quantization quantization_config"
    ),
    "set eval_steps; 0 evaluates at the start and the end": "eval_strategy evaluation_strategy",
    "the start is always evaluated: leave it out": "val_before_train",
    "set save_steps; 0 saves none": "save_strategy",
    "best/, final/ and every checkpoint are kept: leave it out": (
        "save_total_limit load_best_model_at_end save_best_models"
    ),
    "the best evaluation is that of the highest accuracy: leave it out": "metric_for_best_model greater_is_better",
    "every step is logged: leave it out": "logging_strategy logging_steps logging_first_step logging_dir",
    "a run is called by its output_dir, and trackers take the project from WANDB_PROJECT or TRACKIO_PROJECT": (
        "run_name experiment_name exp_name project project_name wandb_project wandb_name wandb_run_name"
    ),
    "where there is no terminal, a step is a line: leave it out": "disable_tqdm",
    "go on with a run by `estune train --resume RUN`": (
        "resume resume_from resume_from_checkpoint resume_from_path resume_mode start_iteration"
    ),
    "an output_dir that holds a run is never overwritten: leave it out": "overwrite_output_dir clean_output_dir",
    "upload a run with `estune push RUN NAME`": (
        "push_to_hub push_to_hub_model_id hub_model_id hub_token hub_private_repo hub_revision"
    ),
    "set shaping: zscore, centered_ranks, winsorized, elite or raw; or per_prompt: none, center or standardize": (
        "reward_normalization scale_rewards normalize_rewards standardize standardize_rewards centered_rank "
        "rank_transform advantage_estimator"
    ),
    "set constraint, as kl<=0.3, whose penalty is learned; compare_with_base tells how far a model has gone": (
        "beta init_kl_coef kl_coef kl_loss_coef kl_penalty use_kl_in_reward use_kl_loss"
    ),
    "estune cannot do it: leave it out": (
        "generation_kwargs mask_truncated_completions max_tool_calling_iterations min_p "
        "multi_objective_aggregation repetition_penalty vllm_mode vllm_structured_outputs_regex"
    ),
}
ANSWERS = {theirs: said for said, names in _ANSWERS.items() for theirs in names.split()}
"""Names of others for what is done in another way here, or not at all, with what to do."""

MEANINGLESS = frozenset(
    """
    accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_epsilon
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
    vllm_server_host vllm_server_port vllm_server_timeout warmup_ratio
    """.split()  # noqa: SIM905
)
"""Names of `GRPOConfig` for gradients, their optimizers and their parallelism, GRPO's loss, and details of
transformers' loop."""

_MEANINGLESS = frozenset(
    """
    adv_estimator clip_ratio clip_ratio_high clip_ratio_low critic_warmup entropy_coeff fp16_opt_level gamma grad_clip
    half_precision_backend kl_ctrl kl_loss_type lam lr_warmup_steps lr_warmup_steps_ratio norm_adv_by_std_in_grpo
    optimizer param_offload ppo_epochs ppo_max_token_len_per_gpu ppo_micro_batch_size ppo_micro_batch_size_per_gpu
    ppo_mini_batch_size use_gradient_checkpointing
    """.split()  # noqa: SIM905
)
"""The like of other trainers."""

_SAME = ("dtype", "learning_rate", "max_new_tokens", "population", "seed", "sigma", "temperature", "top_k", "top_p")
"""Names of ours that mean the same in others' sections, such as `actor_rollout_ref.rollout.temperature`."""


def hint(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to say of a setting that there is none of.

    Args:
        name: what was given; sections before it, with dots between.
        known: the names that are taken where it stands.
        otherwise: what to say where nothing of the kind is known.
    """
    *section, key = name.replace("-", "_").split(".")
    known = set(known)
    # A slip in a name of others is none in one of ours, however like they are.
    meant = {*known, *RENAMED, *ANSWERS, *MEANINGLESS}
    near = [name for name in difflib.get_close_matches(key, sorted(meant), 1, NEAR) if name in known]
    if key not in known and (found := answer(".".join([*section, key]))):
        return found
    return f"did you mean {'.'.join([*section, near[0]])}?" if near else otherwise


def answer(name: str) -> str | None:
    """What stands here for a name of other trainers, or None.

    In their sections it is known with all of them, or by its last part.
    """
    *section, leaf = name.split(".")
    if "critic" in section:
        return NO_MEANING
    if "lora" in section:
        return ANSWERS.get(f"lora_{leaf}", ANSWERS["lora_rank"])
    for key in (name, leaf):
        if key in RENAMED:
            return f"here it is {RENAMED[key]}"
        if key in ANSWERS:
            return ANSWERS[key]
        if key in MEANINGLESS or key in _MEANINGLESS:
            return NO_MEANING
    return f"here it is {leaf}" if section and leaf in _SAME else None
