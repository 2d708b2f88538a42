"""Settings: where they come from, what stands above what, and how a mistake is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from estune.config import EMBEDDED_SETTINGS, SECTIONS, Config, embedded_settings, load, parse, read
from estune.config.names import ANSWERS, MEANINGLESS, RENAMED
from estune.errors import EstuneError
from estune.tasks import KINDS

ROOT = Path(__file__).parents[1]


def test_defaults_are_the_papers_for_any_model_but_the_embedded_one() -> None:
    config = Config(model="Qwen/Qwen2.5-0.5B-Instruct")
    assert (config.population, config.sigma, config.learning_rate, config.temperature) == (30, 0.001, "0.5sigma", 0.0)
    assert (config.prompts_per_step, config.max_new_tokens, config.steps) == (200, 1024, 500)


def test_the_embedded_model_brings_its_own() -> None:
    own = yaml.safe_load(EMBEDDED_SETTINGS.read_text())
    config = Config()
    assert (config.model, config.sigma, config.steps) == ("tiny", own["sigma"], own["steps"])
    assert Config(model="tiny", sigma=0.5).sigma == 0.5
    assert Config(task={"eval_size": 7}).task.eval_size == 7
    assert Config(task={"eval_size": 7}).task.train_size == own["tasks"]["countdown"]["task"]["train_size"]
    assert Config(task="countdown").task.train_size == own["tasks"]["countdown"]["task"]["train_size"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "model: some/model\nsigma: 1e-3\nseed: 3\ntask:\n  name: countdown\n  eval_size: 50\n"),
        ("run.toml", 'model = "some/model"\nsigma = 1e-3\nseed = 3\n[task]\nname = "countdown"\neval_size = 50\n'),
    ],
)
def test_files_and_overrides(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    config = load(tmp_path / name, ["sigma=2e-4", "task.train_size=9", "lr-scheduler-type=linear", "report_to=[]"])
    assert (config.model, config.seed, config.sigma) == ("some/model", 3, 2e-4)
    assert (config.task.eval_size, config.task.train_size) == (50, 9)
    assert (config.lr_scheduler_type, config.report_to) == ("linear", [])


@pytest.mark.parametrize("text", ["123", "0x10", "1e3", "1.10", "true", "2026-01-01", "[a]", "a: b", "x=y"])
def test_text_stays_text_whatever_it_looks_like(text: str) -> None:
    config = load(None, [f"model={text}", f"output_dir={text}", f"task.data={text}"])
    assert (config.model, config.output_dir, config.task.data) == (text, Path(text), text)


def test_overrides_take_the_type_of_their_setting() -> None:
    config = load(None, ["steps=7", "sigma=1e-3", "mirrored", "task.rational=true", "task.count=3", "batch_size=null"])
    assert (config.steps, config.sigma, config.mirrored, config.batch_size) == (7, 1e-3, True, None)
    assert (config.task.rational, config.task.count) == (True, (3, 3))


@pytest.mark.parametrize(
    ("value", "trackers"),
    [("tensorboard", ["tensorboard"]), ("none", []), ("[]", []), ("tensorboard, ", ["tensorboard"]), (["none"], [])],
)
def test_report_to_is_written_as_for_trl(value: str | list[str], trackers: list[str]) -> None:
    assert parse({"report_to": value}).report_to == trackers
    if isinstance(value, str):
        assert load(None, [f"report_to={value}"]).report_to == trackers


@pytest.mark.parametrize("name", ["steps", "seed", "population", "sigma", "learning_rate", "batch_size", "model"])
def test_true_is_no_number_and_no_name(name: str) -> None:
    with pytest.raises(EstuneError, match=f"^settings: {name}: .*no switch"):
        parse({name: True})
    with pytest.raises(EstuneError, match=f"^settings: {name}: .*no switch"):
        load(None, [name])


def test_true_is_no_number_for_a_task_either() -> None:
    with pytest.raises(EstuneError, match=r"task\.train_size: train_size is no switch"):
        parse({"task": {"train_size": True}})
    assert parse({"task": {"rational": True}}).task.rational


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", float("inf"), float("nan")])
def test_no_setting_takes_what_is_not_finite(value: str | float) -> None:
    numbers = (float, float | None, float | str | None)
    floats = [name for name, field in Config.model_fields.items() if field.annotation in numbers]
    assert {"sigma", "learning_rate", "weight_decay", "temperature", "top_p"} <= set(floats)
    for name in floats:
        with pytest.raises(EstuneError, match=f"^settings: {name}: "):
            parse({name: value})


@pytest.mark.parametrize(
    ("given", "found"),
    [(0.02, 0.02), ("2e-2", 0.02), ("0.25sigma", "0.25sigma"), ("1 sigma", "1.0sigma"), (None, "0.5sigma"), (0, 0.0)],
)
def test_a_learning_rate_is_a_number_or_so_many_sigmas(given: Any, found: float | str) -> None:
    config = parse({"model": "any", "learning_rate": given})
    assert config.learning_rate == found
    assert parse(config.model_dump(mode="json")).learning_rate == found


@pytest.mark.parametrize("given", ["sigma", "0.5 sigmas", "-1sigma", "-0.1", "infsigma", "sigma/2", "half", [0.1]])
def test_what_is_no_learning_rate_is_refused_in_a_line(given: Any) -> None:
    with pytest.raises(EstuneError, match=r"^settings: learning_rate: write a number from 0 on, .* 0\.5sigma, found"):
        parse({"learning_rate": given})


def test_a_learning_rate_that_is_not_given_follows_the_population() -> None:
    rates = [parse({"model": "any", "population": n}).learning_rate for n in (2, 15, 30, 60, 270, 4000)]
    assert rates == ["0.5sigma", "0.5sigma", "0.5sigma", "0.707sigma", "1.5sigma", "1.5sigma"]
    assert parse({"learning_rate": None, "population": 120}).learning_rate == "1.0sigma"  # not the embedded model's


def test_what_was_said_is_kept_apart_from_what_follows_from_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("sigma: 0.5\ntask:\n  eval_size: 50\n")
    given = read(tmp_path / "run.yaml", ["task.train_size=9"])
    assert given == {"sigma": 0.5, "task": {"eval_size": 50, "train_size": "9"}}
    assert read() == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sigmas=1"], "unknown setting sigmas; did you mean sigma?"),
        (["task=rows.jsonl"], r"--task\.data rows\.jsonl --task\.rewards FILE\.py:FUNCTION$"),
        (["task.eval_sise=1"], r"unknown setting task\.eval_sise; did you mean task\.eval_size\?"),
        (["zzz=1"], "unknown setting zzz; see"),
        (["sigma=0"], "sigma: Input should be greater than 0, found '0'"),
        (["sigma=-0.1"], "sigma: .*found '-0.1'"),
        (["sigma=nan"], "sigma: "),
        (["sigma=much"], "sigma: .*found 'much'"),
        (["population=1"], "population: .*greater than or equal to 2, found '1'"),
        (["population=3", "mirrored=true"], "population 3 is odd"),
        (["weights=inplace", "replicas=2"], "replicas must be 1"),
        (["weights=inplace", "workers=2"], "leave out workers"),
        (["workers=2", "replicas=2"], "give workers instead"),
        (["engine=vllm", "replicas=2"], "give workers instead"),
        (["engine=transformers", "gpus_per_worker=2"], "which engine=vllm does"),
        (["engine=vllm", "workers=2", "gpus_per_worker=2", "workers_per_gpu=2"], "cannot both be more than 1"),
        (["workers_per_gpu=2"], "say how many"),
        (["engine=transformers", "vllm_max_model_length=512"], "vllm_max_model_length is about engine=vllm"),
        (["workers_per_gpu=auto", "replicas=2"], "leave out one"),
        (["workers_per_gpu=some", "workers=2"], "^settings: workers_per_gpu: write a number from 1 on, or auto, .*$"),
        (["workers_per_gpu=0", "workers=2"], "^settings: workers_per_gpu: write a .* or auto, found '0'$"),
        (["vllm_max_model_length=100", "max_new_tokens=100"], "100 is to hold a prompt and max_new_tokens 100"),
        (["device=mps", "workers=2"], "leave out workers and engine=vllm"),
        (["device=mps", "engine=vllm"], "leave out workers and engine=vllm"),
        (["weights=split_master", "dtype=float32"], "not in float32: set dtype=bfloat16, or weights=exact_inplace"),
        (["weights=split_master", "dtype=float16"], "not in float16: set dtype=bfloat16, or weights=master"),
        (["weights=split_master", "adam=true"], "weights must be master"),
        (["weights=split_master", "dtype=bfloat16", "adapter.rank=8"], "an adapter's are float32: set weights=exact"),
        (["weights=split_master", "base_device=host"], "keeps no base that base_device=host could hold"),
        (["device=mps", "weights=exact_inplace"], "set weights=copy or master"),
        (["ray_address=auto"], "say how many"),
        (["task=chess"], "task.*countdown"),
        (["chat_template_kwargs={a: 1}"], r"""write a mapping, such as {"enable_thinking": false}, found '{a: 1}'"""),
        (["sigma_scale={a: 1}"], r"""write a mapping, such as {"\*.mlp.\*": 0.5}, found '{a: 1}'"""),
        *(
            (
                [f'sigma_scale={{"*": {factor}}}'],
                "^settings: sigma_scale: write a number above 0, .* or rms, found '[^;]*$",
            )
            for factor in ('"x"', -1, 1e-50, 1e39)  # of the last two float32 makes 0 and infinity
        ),
        (["noise=rank3"], "^settings: noise: Input should be 'iid', .*'rank4', 'rank8' or 'auto', found 'rank3'$"),
        (["steps=true"], "steps: .*found 'true'"),
        (["report_to=mlflow"], "report_to.*: .*'tensorboard', 'wandb' or 'trackio', found 'mlflow'"),
        (["early_stopping_patience=2", "eval_steps=0"], "early_stopping_patience counts evaluations"),
        (["=1"], "not of the form key=value"),
    ],
)
def test_mistakes_are_one_clear_line(overrides: list[str], message: str) -> None:
    with pytest.raises(EstuneError, match=message) as caught:
        load(None, overrides)
    assert "\n" not in str(caught.value)


def test_exact_in_place_rounds_stochastically_unless_told() -> None:
    assert load(None, ["weights=exact_inplace"]).rounding == "stochastic"
    assert load(None, ["weights=exact_inplace", "rounding=nearest"]).rounding == "nearest"
    assert load(None, ["weights=split_master"]).rounding == "nearest"
    assert load(None, ["weights=copy"]).rounding == "nearest"


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        # TRL, transformers, Unsloth
        ("num_generations=8", "a step is population members that answer the same prompts_per_step prompts"),
        ("per-device-train-batch-size=8", "a step is population members"),
        ("max_completion_length=8", "here it is max_new_tokens"),
        ("max_prompt_length=8", "prompts are never cut"),
        ("max_seq_length=8", "prompts are never cut"),
        ("max_steps=8", "here it is steps"),
        ("num_train_epochs=1", "set steps: each draws"),
        ("torch_dtype=float16", "here it is dtype"),
        ("beta=0.1", "set constraint, as kl<=0.3, whose penalty is learned"),
        ("logging_steps=1", "every step is logged: leave it out"),
        ("lora_rank=8", "set adapter.rank"),
        ("gradient_accumulation_steps=8", "no meaning for Evolution Strategies: leave it out"),
        ("resume_from_checkpoint=x", "go on with a run by `estune train --resume RUN`"),
        # the paper's scripts
        ("population-size=30", "here it is population"),
        ("num_iterations=500", "set steps"),
        ("n_iterations=500", "here it is steps"),
        ("alpha=0.1", "here it is learning_rate"),
        ("model_name=x", "here it is model"),
        # verl, prime-rl
        ("lr=0.1", "here it is learning_rate"),
        ("data.max_response_length=8", r"data\.max_response_length; here it is max_new_tokens"),
        ("actor_rollout_ref.rollout.n=8", r"rollout\.n; a step is population members"),
        ("actor_rollout_ref.rollout.temperature=1", "here it is temperature"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", r"actor\.optim\.lr; here it is learning_rate"),
        ("critic.optim.lr=1e-6", "no meaning"),
        ("trainer.model.lora.alpha=32", "set adapter.alpha"),
        ("orchestrator.batch_size=8", "a step is population members"),
        ("trainer.nnodes=1", "unknown setting trainer; see `estune train --help`"),
        ("model.name=x", "model: .*, found a section, model.name"),
        ("grpo.num_generations_per_prompt=8", "a step is population members"),
        ("n_samples=8", "set population; or eval_samples"),
        ("vllm=true", "set engine: vllm$"),
        ("vllm.gpu_memory_utilization=0.5", "here it is vllm_gpu_memory_utilization"),
        # EGGROLL's scripts and those of other Evolution Strategies
        ("noise_std=0.01", "here it is sigma$"),
        ("prompts_per_epoch=8", "here it is prompts_per_step"),
        ("validate_every=10", "here it is eval_steps"),
        ("popsize=8", "here it is population"),
        ("sigma_decay=0.9", "set sigma_scheduler_type and min_sigma_rate"),
        # what stands elsewhere here
        ("max_eval_samples=8", r"here it is task\.eval_size"),
        ("num_eval_samples=8", r"set task\.eval_size for held-out rows, or eval_samples"),
        ("eval_size=8", r"did you mean task\.eval_size\?"),
        ("task.max_tokens=8", "here it is max_new_tokens"),
        ("task.steps=8", "it is none of the task's: give steps itself"),
        ("task.rewards=f", "it is an option of custom$"),
    ],
)
def test_names_of_other_trainers_are_answered_with_ours(override: str, answer: str) -> None:
    with pytest.raises(EstuneError, match=f"^settings: .*{answer}") as caught:
        load(None, [override])
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("settings: ") == 1


def test_a_file_of_another_trainer_s_is_answered_name_by_name(tmp_path: Path) -> None:
    (tmp_path / "rl.toml").write_text(
        'max_steps = 20\n[monitors.wandb]\nname = "x"\n[trainer.optim]\nlr = 1e-5\nbetas = [1, 2]\n'
    )
    with pytest.raises(EstuneError) as caught:
        load(tmp_path / "rl.toml")
    said = str(caught.value).replace(f"{tmp_path / 'rl.toml'}: ", "").split("; ")
    assert said == [
        *("unknown setting max_steps", "here it is steps"),
        *("unknown setting monitors", "see `estune train --help`"),
        *("unknown setting trainer.optim.lr", "here it is learning_rate"),
    ]
    (tmp_path / "dashes.yaml").write_text("report-to: none\n")
    with pytest.raises(EstuneError, match=r"unknown setting report-to; did you mean report_to\?"):
        load(tmp_path / "dashes.yaml")


# Of transformers 4 and TRL 0.x, verl, OpenRLHF, prime-rl and Unsloth: none of them a slip of the pen.
OTHERS = """
    evaluation_strategy eval_delay logging_dir overwrite_output_dir warmup_ratio warmup_steps per_gpu_train_batch_size
    half_precision_backend jit_mode_eval torchdynamo mp_parameters no_cuda use_ipex group_by_length use_mps_device
    push_to_hub_token include_inputs_for_metrics fp16_backend dispatch_batches split_batches tpu_num_cores past_index
    ref_model_init_kwargs vllm_device vllm_dtype vllm_guided_decoding_regex wandb_log_unique_prompts model_adapter_name
    missing_eos_penalty num_ppo_epochs whiten_rewards kl_estimator cliprange vf_coef response_length stop_token
    ppo_mini_batch_size clip_ratio adv_estimator nnodes total_epochs test_freq val_only reward_manager critic_warmup
    rollout_batch_size micro_train_batch_size n_samples_per_prompt init_kl_coef zero_stage actor_learning_rate
    seq_len max_async_level max_off_policy_steps advantage_range env_args ckpt inference orchestrator trainer
    load_in_4bit max_lora_rank random_state use_gradient_checkpointing loftq_config bias token target_modules
    reward_shaping n_gpu_per_vllm_engine save_best_models wandb_project eval_freq start_iteration verbose
    noise_std n_samples vllm n_rollouts lr_scale parallel_generations_per_gpu noise_reuse freeze_nonlora coord_addr
    num_procs max_eval_samples num_eval_samples eval_num_samples eval_n generations num_workers val_period max_samples
    micro_rollout_batch_size generate_max_len eps_clip use_kl_estimator_k3 vllm_num_engines ring_attn_size
""".split()  # noqa: SIM905


def test_no_name_of_another_trainer_gets_a_wrong_suggestion() -> None:
    """A setting that is named is one that the answer was written for, not one that looks alike."""
    names = set(OTHERS) | MEANINGLESS
    if find_spec("trl") is not None:
        from trl import GRPOConfig

        names |= {field.name for field in fields(GRPOConfig)}
    ours = {*Config.model_fields, *(name for kind in KINDS.values() for name in kind.model_fields)}
    for name in names - ours:
        with pytest.raises(EstuneError, match=f"^settings: unknown setting {name}; ") as caught:
            parse({name: 1})
        assert "did you mean" not in str(caught.value)


def test_answers_name_settings_that_there_are() -> None:
    known = {*Config.model_fields, *(f"task.{name}" for kind in KINDS.values() for name in kind.model_fields)}
    assert set(RENAMED.values()) <= known
    assert not RENAMED.keys() & ANSWERS.keys()
    assert not (RENAMED.keys() | ANSWERS.keys()) & known


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(EstuneError, match="population: .*; .*sigma: "):
        parse({"sigma": 0, "population": 0})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *[("a.yaml", text) for text in ("a: [1", "- 1", "", "a: " + "[" * 2000, "a: !!bool x", "a: 2001-99-99")],
        *[("a.yaml", text) for text in ("a: !!int ''", "a: !!timestamp x")],
        *[("a.toml", text) for text in ("a = ", "a = " + "[" * 2000)],
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EstuneError, match=f"config {tmp_path / name} ") as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(EstuneError, match="no such file"):
        load(tmp_path / "none.yaml")


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(EstuneError, match="empty.yaml holds nothing, where settings should be: write one `key: value`"):
        load(tmp_path / "empty.yaml")


def test_settings_survive_a_round_trip() -> None:
    config = Config(output_dir=Path("somewhere"), task={"count": "3-4"})
    assert parse(config.model_dump(mode="json")) == config
    assert parse(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


SHIPPED = [*(ROOT / "recipes").rglob("*.[yt]*ml"), *(ROOT / "examples").glob("*.[yt]*ml")]  # not those of clusters


@pytest.mark.parametrize("file", sorted(SHIPPED), ids=lambda file: file.name)
def test_shipped_settings_are_right(file: Path) -> None:
    assert load(file).model_dump()


@pytest.mark.parametrize("task", KINDS)
def test_the_embedded_model_s_settings_are_right(task: str) -> None:
    settings = embedded_settings(task)
    assert settings["task"]["name"] == task
    unknown = settings.keys() - Config.model_fields.keys()
    assert not unknown


def test_settings_are_flat_in_the_order_of_their_sections() -> None:
    assert [name for section in SECTIONS for name in section.model_fields] == list(Config.model_fields)


@pytest.mark.parametrize(
    "module",
    [
        "estune",
        "estune.config",
        "estune.es",
        "estune.cli",
        "estune.journal.journal",
        "estune.journal.replay",
    ],
)
def test_light_modules_load_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'numba')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_of_a_task_may_stand_before_its_name() -> None:
    given = ["task.eval_size=7", "task=countdown-turns", "task.tries=3"]
    task = load(None, given).task
    assert (task.name, task.eval_size, task.tries) == ("countdown-turns", 7, 3)  # type: ignore[union-attr]
    with pytest.raises(EstuneError, match="unknown setting task.progam; did you mean task.program?"):
        load(None, ["task.progam=x", "task=custom"])


@pytest.mark.parametrize("text", ["kl<=1e-3", "kl <= 1e-3", "rewards/right/mean>=-0.5", "kl<=2e+1"])
def test_a_bound_is_any_number_that_is_written_down(text: str) -> None:
    assert load(None, [f"constraint={text}"]).constraint == text.replace(" ", "")
