"""`ESTrainer` and `ESConfig` beside TRL's own: the same script, the same names, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from estune import ESConfig, ESTrainer, EstuneError
from estune.config import Config
from estune.config.names import MEANINGLESS
from estune.journal.journal import Journal
from estune.trl.config import MISSING, OWN, TAKEN
from tests.models import VOCABULARY, build_tokenizer, save_model
from tests.runs import PROMPTS, assert_same_run, variety
from tests.visions import picture, png, save_vision

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
SMALL = {"max_steps": 4, "population": 4, "sigma": 0.02, "prompts_per_step": 6, "max_completion_length": 8}
QUIET = {"report_to": "none", "eval_steps": 2, "replicas": 1, "disable_tqdm": True}


def make(output: Path, model: Any, rewards: Any = variety, *, settings: Any = (), **arguments: Any) -> ESTrainer:
    args = ESConfig(output, **{**SMALL, **QUIET, **dict(settings)})
    return ESTrainer(model, rewards, args, **{"train_dataset": ROWS[4:], "eval_dataset": ROWS[:4], **arguments})


@pytest.fixture(scope="module")
def _trl() -> None:
    pytest.importorskip("trl", exc_type=ImportError)


@pytest.mark.usefixtures("_trl")
def test_a_trl_script_changes_two_names(tmp_path: Path) -> None:
    scripts = [ROOT / "examples" / f"{name}.py" for name in ("grpo", "es")]
    theirs, ours = (path.read_text() for path in scripts)
    renamed = theirs.replace("GRPOConfig", "ESConfig").replace("GRPOTrainer", "ESTrainer")
    assert renamed.replace("from trl import", "from estune import") == ours
    assert sum(a != b for a, b in zip(theirs.splitlines(), ours.splitlines(), strict=True)) == 3
    model = save_model(tmp_path / "base", eos_token_id=0)
    base = load_file(model / "model.safetensors")
    for path in scripts:
        output = tmp_path / path.stem
        ran = subprocess.run(
            [sys.executable, path, model, output], capture_output=True, text=True, env={**os.environ}, check=False
        )
        assert ran.returncode == 0, ran.stderr
        lines = [line.partition(":")[0] for line in ran.stdout.splitlines() if line.startswith("step ") and ":" in line]
        assert [line for line in lines if line != "step 0"] == ["step 1", "step 2", "step 3", "step 3"]
        saved = load_file(output / "model.safetensors")
        assert base.keys() == saved.keys()
        assert any(not torch.equal(saved[name].float(), base[name]) for name in base)


@pytest.mark.usefixtures("_trl")
def test_every_name_of_grpo_config_is_known() -> None:
    from trl import GRPOConfig

    theirs = {field.name for field in dataclasses.fields(GRPOConfig)}
    ours = {*Config.model_fields, *OWN, *TAKEN, *MISSING, *MEANINGLESS}
    assert theirs - ours == set()
    invented = {*OWN, *TAKEN, *MISSING, *MEANINGLESS} - theirs - {"alpha", "warmup_ratio"}
    # Names of transformers 5.23, for which older versions have others.
    invented -= {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert invented == set()
    for name in theirs:
        getattr(ESConfig(), name)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"steps": 500, "max_new_tokens": 1024, "temperature": 0.0, "prompts_per_step": 200, "eval_steps": 10}),
        ({"max_steps": 7, "num_train_epochs": 9, "max_completion_length": 5}, {"steps": 7, "max_new_tokens": 5}),
        ({"num_train_epochs": 1.5, "prompts_per_step": 30}, {"steps": 5}),
        ({"num_train_epochs": 2}, {"steps": 2}),
        (
            {"eval_strategy": "epoch", "save_strategy": "epoch", "prompts_per_step": 30},
            {"eval_steps": 4, "save_steps": 4},
        ),
        ({"max_steps": 50, "eval_steps": 0.1, "save_steps": 0.5}, {"eval_steps": 5, "save_steps": 25}),
        ({"save_strategy": "steps"}, {"save_steps": 500}),
        ({"save_strategy": "no", "save_steps": 10}, {"save_steps": 0}),
        ({"bf16": True, "use_cpu": True}, {"dtype": "bfloat16", "device": "cpu"}),
        ({"model_init_kwargs": {"torch_dtype": torch.float16, "device_map": None}}, {"dtype": "float16"}),
        ({"use_vllm": False}, {"engine": "transformers"}),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, {"engine": "vllm", "gpus_per_worker": 2}),
        ({"log_completions": True}, {"log_completions": 1}),
        ({"log_completions": False}, {"log_completions": 0}),
        ({"learning_rate": 1e-6}, {"learning_rate": "0.5sigma"}),
        ({"learning_rate": "0.2sigma"}, {"learning_rate": "0.2sigma"}),
        ({"learning_rate": 1e-6, "population": 60}, {"learning_rate": "0.707sigma"}),
        ({"learning_rate": 2e-4}, {"learning_rate": 2e-4}),
        ({"alpha": 1e-6}, {"learning_rate": 1e-6}),
        ({"alpha": 1e-6, "learning_rate": None}, {"learning_rate": 1e-6}),
        ({"eval_on_start": False, "num_generations_eval": 4}, {"eval_on_start": False, "eval_samples": 4}),
        ({}, {"eval_on_start": True, "eval_samples": 1, "chat_template_kwargs": {}}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"bf16": True, "dtype": "auto"}, {"dtype": "bfloat16"}),
        ({"lr_scheduler_type": "cosine", "weight_decay": 0.1}, {"lr_scheduler_type": "cosine", "weight_decay": 0.1}),
        ({"seed": 3, "report_to": ["tensorboard"]}, {"seed": 3, "report_to": ["tensorboard"]}),
    ],
)
def test_settings_carry_over(given: dict[str, Any], found: dict[str, Any]) -> None:
    config = ESConfig(**given).build("any", 100)
    assert {name: getattr(config, name) for name in found} == found


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"population_size": 5}, "unknown setting population_size; here it is population"),
        ({"max_prompt_length": 5}, "prompts are never cut"),
        ({"torch_dtype": "float16"}, "here it is dtype"),
        ({"lora_rank": 5}, "set adapter.rank"),
        ({"dataset_name": "x"}, "ESTrainer takes model, reward_funcs and data itself"),
        ({"num_generation": 5}, "unknown setting num_generation; see docs/trl.md"),
        ({"max_completion_lenght": 5}, "unknown setting max_completion_lenght; did you mean max_completion_length"),
        ({"population": 1}, "population"),
        ({"model": "x"}, "ESTrainer takes model"),
        ({"repetition_penalty": 1.1}, "cannot do repetition_penalty=1.1; leave it out"),
        ({"vllm_mode": "server"}, "cannot do vllm_mode='server'"),
        ({"model_init_kwargs": {"revision": "a"}}, "cannot load a model with revision"),
        ({"eval_strategy": "often"}, "eval_strategy is one of no, steps, epoch"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16"),
        ({"alpha": 1e-3, "learning_rate": 1e-3}, "alpha and learning_rate are both given, and are one setting: leave"),
        ({"max_new_tokens": 5, "max_completion_length": 6}, "max_new_tokens and max_completion_length are both given"),
        ({"steps": 5, "max_steps": 6}, "steps and max_steps are both given"),
        ({"bf16": True, "dtype": "float16"}, "bf16=True is dtype='bfloat16', and dtype is 'float16': leave out one"),
        ({"use_cpu": True, "device": "cuda"}, "use_cpu=True is device='cpu', and device is 'cuda'"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: messages cannot be given here"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EstuneError, match=complaint):
        ESConfig(**given)


def test_what_is_not_used_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    ESConfig(max_steps=3, repetition_penalty=1.0).build("any", 10)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        ESConfig(beta=0.1, num_generations=8, learning_rate=1e-6, temperature=0.7).build("any", 10)
    (record,) = caplog.records
    text = record.getMessage()
    assert "beta, num_generations: no meaning" in text
    assert "insist with alpha=1e-06" in text
    assert "temperature 0.7" in text


def test_data_rewards_and_results(model: Path, tmp_path: Path) -> None:
    """Data sets, messages, columns, several rewards with weights, evaluation sets by name, and what comes back."""
    asked = [{"prompt": [{"role": "user", "content": p}], "number": i} for i, p in enumerate(PROMPTS)]
    seen: set[int] = set()

    def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [len(set(ids)) / 10 for ids in completion_ids]

    def numbered(completions: list[Any], number: list[int], **_: Any) -> list[float | None]:
        seen.update(number)
        return [
            len(messages[-1]["content"]) / 10 if n % 2 else None
            for messages, n in zip(completions, number, strict=True)
        ]

    sets = {"easy": Dataset.from_list(asked[:3]), "hard": Dataset.from_list(asked[3:6])}
    trainer = make(
        *(tmp_path / "run", str(model), [lengths, numbered]),
        train_dataset=Dataset.from_list(asked[6:]),
        eval_dataset=sets,
        reward_weights=[1.0, 0.5],
        settings={"metric_for_best_model": "eval_rewards/numbered/mean"},
    )
    output = trainer.train()
    assert output.global_step == 4
    assert math.isnan(output.training_loss)
    assert output.metrics["train_steps_per_second"] > 0
    assert seen == set(range(len(PROMPTS)))
    last = [logs for logs in trainer.state.log_history if "eval_reward" in logs][-1]
    assert last["eval_accuracy"] == last["eval_rewards/numbered/mean"]
    assert {"eval_accuracy/easy", "eval_accuracy/hard", "eval_rewards/lengths/mean"} <= last.keys()
    found = trainer.evaluate()
    assert {key: found[key] for key in found if key != "epoch"} == {
        key: value for key, value in last.items() if key in found and key != "epoch"
    }
    assert trainer.evaluate(asked[6:9], metric_key_prefix="test")["test_reward"] > 0
    trainer.save_model(tmp_path / "saved")
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == final
    trainer.save_model()
    assert Journal.read(tmp_path / "run").steps


def test_a_model_in_memory_and_its_tokenizer(model: Path, tmp_path: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        net.model.norm.weight.mul_(1.5)  # it is this model that is trained, not the one it was loaded from
    trainer = make(tmp_path / "run", net)
    before = trainer.evaluate()
    trainer.train()
    base = load_file(tmp_path / "run" / "base" / "model.safetensors")
    assert torch.equal(base["model.norm.weight"], net.model.norm.weight)
    assert Journal.read(tmp_path / "run").header.model == str(tmp_path / "run" / "base")
    first = next(logs for logs in trainer.state.log_history if "eval_reward" in logs)
    assert before["eval_reward"] == first["eval_reward"]
    net.config._name_or_path = str(tmp_path / "nowhere")
    homeless = make(tmp_path / "other", net)
    with pytest.raises(EstuneError, match="no tokenizer"):
        homeless.train()


@pytest.mark.parametrize("given", ["name", "memory", "processor", "other"])
def test_a_model_that_sees_is_shown_pictures(given: str, tmp_path: Path) -> None:
    """As `transformers` loads it, with its processor or another one."""
    model = save_vision(tmp_path / "model", "llava")
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    shown: list[Any] = []

    def colours(completions: list[str], image: list[Any], **_: Any) -> list[float]:
        shown.extend(image)
        return variety(completions)

    processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    arguments: dict[str, Any] = {"processing_class": processor} if given in ("processor", "other") else {}
    if given == "other":
        processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    net: Any = str(model)
    if given == "memory":
        net = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=False)
    rows = Dataset.from_list([{"prompt": "How many?", "image": picture(n, n)} for n in range(1, 9)])
    settings = {"max_steps": 2, "prompts_per_step": 3}
    data = {"train_dataset": rows.select(range(2, 8)), "eval_dataset": rows.select(range(2))}
    trainer = make(tmp_path / "run", net, colours, settings=settings, **data, **arguments)
    trainer.train()
    assert {name: (model / name).read_bytes() for name in files} == files
    assert {picture.data for picture in shown} <= {png(picture(n, n)) for n in range(1, 9)}
    journal = Journal.read(tmp_path / "run")
    assert any(max(record.rewards) > min(record.rewards) for record in journal.steps)
    assert not any("vision" in name for name in journal.header.tensors)
    base = tmp_path / "run" / "base"
    assert base.is_dir() == (given in ("memory", "other"))
    if given == "other":
        kept = AutoProcessor.from_pretrained(base, trust_remote_code=False)
        assert set(kept.image_processor.image_mean) == {0.0}


def test_another_tokenizer_is_used(model: Path, tmp_path: Path) -> None:
    same = AutoTokenizer.from_pretrained(model, padding_side="left")
    same.pad_token = same.eos_token
    make(tmp_path / "same", str(model), processing_class=same, settings={"max_steps": 1}).train()
    assert not (tmp_path / "same" / "base").exists()
    other = build_tokenizer()
    other.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    make(tmp_path / "other", str(model), processing_class=other, settings={"max_steps": 1}).train()
    assert AutoTokenizer.from_pretrained(tmp_path / "other" / "final").chat_template == other.chat_template
    assert (tmp_path / "other" / "base" / "model.safetensors").is_symlink()
    assert AutoTokenizer.from_pretrained(model).chat_template != other.chat_template
    third = build_tokenizer()
    third.chat_template = "{{ messages }}"
    with pytest.raises(EstuneError, match="processing_class is not the tokenizer that the run .* began with"):
        make(tmp_path / "other", str(model), processing_class=third).train(resume_from_checkpoint=True)


def test_resuming_is_as_if_undisturbed(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = make(tmp_path / "whole", str(model))
    whole.train()
    make(tmp_path / "run", str(model), settings={"max_steps": 2}).train()
    again = make(tmp_path / "run", str(model))
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert "keeps its settings" not in caplog.text  # engine=auto is no wish for another engine
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    for key in ("reward", "eval_reward"):
        a, b = ([logs[key] for logs in t.state.log_history if key in logs] for t in (whole, again))
        assert a == b
    with pytest.raises(
        EstuneError, match=r"holds a run: go on with `trainer.train\(resume_from_checkpoint='.*/run'\)`"
    ):
        make(tmp_path / "run", str(model)).train()
    with pytest.raises(EstuneError, match="nowhere"):
        make(tmp_path / "run", str(model)).train(resume_from_checkpoint=tmp_path / "nowhere")


def test_reward_models_grade(model: Path, tmp_path: Path) -> None:
    judge = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_labels=1, pad_token_id=1,
        )
    )  # fmt: skip
    judge.save_pretrained(tmp_path / "judge")
    tokenizer = build_tokenizer()
    one = {"max_steps": 1}
    trainer = make(
        *(tmp_path / "run", str(model), [str(tmp_path / "judge"), variety]),
        reward_processing_classes=[tokenizer, None],
        settings=one,
    )
    trainer.train()
    assert any("rewards/judge/mean" in logs for logs in trainer.state.log_history)


def test_the_card_and_a_hub_out_of_reach(model: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", str(model), settings={"max_steps": 1, "hub_model_id": "me/brief"})
    trainer.train()
    card = trainer.model_card("me/brief", "me/questions")
    data = ModelCard(card).data
    assert (data.library_name, data.datasets, data.model_name) == ("transformers", "me/questions", "me/brief")
    assert "1 step of 4 members on 6 prompts, sigma 0.02, learning rate 0.01" in card
    with pytest.raises(EstuneError, match="push me/brief: .*nothing is lost"):
        trainer.push_to_hub()


def test_what_cannot_be_trained_with_is_refused(model: Path, tmp_path: Path) -> None:
    def refused(match: str, **arguments: Any) -> None:
        with pytest.raises(EstuneError, match=match):
            make(tmp_path / "run", str(model), **{"rewards": variety, **arguments})
        assert not (tmp_path / "run").exists()

    refused("no train_dataset", train_dataset=None)
    refused("is a stream", train_dataset=IterableDataset.from_generator(lambda: iter(ROWS)))
    refused("dict of sets", train_dataset={"train": ROWS})
    refused("no column prompt", train_dataset=[{"question": "?"}])
    refused("row 0 is str", train_dataset=["hello"])
    refused("no reward_funcs", rewards=None)
    refused("1 weights", rewards=[variety, slow], reward_weights=[1.0])
    refused("2 reward_processing_classes", reward_processing_classes=[None, None])
    refused("peft_config cannot be used", peft_config=object())
    refused("no argument modle", modle="x")
    refused("give an eval_dataset", eval_dataset=None, settings={"eval_strategy": "steps"})
    with pytest.raises(EstuneError, match="give an ESConfig"):
        ESTrainer(str(model), variety, args={"max_steps": 1}, train_dataset=ROWS)  # type: ignore[arg-type]


def slow(completions: list[Any], **_: Any) -> list[float]:
    """Another reward."""
    return [0.0 for _ in completions]


def test_importing_is_cheap() -> None:
    code = "import sys, estune; estune.ESConfig(max_steps=1); sys.exit('torch' in sys.modules or 'trl' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_callers_settings_stay_the_callers(model: Path, tmp_path: Path) -> None:
    args = ESConfig(max_steps=1, report_to="none")
    before = repr(args), dict(vars(args))
    trainer = ESTrainer(str(model), variety, args, [{"prompt": p} for p in PROMPTS])
    assert (repr(args), vars(args)) == before
    assert args.output_dir is None
    assert trainer.args.output_dir == str(trainer.directory.path)
    other = ESTrainer(str(model), variety, args, [{"prompt": p} for p in PROMPTS[4:]], [{"prompt": PROMPTS[0]}])
    assert (trainer.args.eval_strategy, other.args.eval_strategy) == ("no", "steps")


def test_without_an_evaluation_set_nothing_is_evaluated(model: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", str(model), eval_dataset=None)
    trainer.train()
    assert not Journal.read(tmp_path / "run").evaluations
    assert not (tmp_path / "run" / "best").exists()
    assert (tmp_path / "run" / "final").is_dir()
    with pytest.raises(EstuneError, match="give eval_dataset"):
        trainer.evaluate()
