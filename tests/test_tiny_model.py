import importlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import estune
from estune.rewards.countdown import answer_reward, format_reward
from estune.tasks import CountdownConfig
from estune.tasks.countdown_problems import countdown_prompt, is_held_out

TINY = Path(estune.__file__).parent / "models" / "tiny"
TAGS = "<think>", "</think>", "<answer>", "</answer>"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


tokenizer = AutoTokenizer.from_pretrained(TINY)


def test_it_is_small(model: Any) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_500_000
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 4 * 2**20


def test_it_is_a_plain_checkpoint_that_knows_its_end(model: Any) -> None:
    assert model.config.model_type == "qwen2"
    assert model.config.tie_word_embeddings
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_countdown_prompt_is_a_few_tokens() -> None:
    prompt = countdown_prompt([44, 19, 35], 98)
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) <= 12
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n  a\t", "100 1000.5 007 1,2, 3", "naïve 日本 🙂", " <answer> (1 + 2) / 3 </answer>", *TAGS,
     "7*3=21</think>\n<answer>7*3</answer>", "<|not a token|>", "</think>\n\n<answer>"],
)  # fmt: skip
def test_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_any_ascii_text_survives_the_tokenizer(text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template() -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def complete(model: Any, prompts: list[str], longest: int) -> list[str]:
    """Greedy completions of prompts of equal length."""
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False)
    return list(tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True))


def accuracy(rows: list[dict[str, Any]], completions: list[str]) -> float:
    columns = {key: [row[key] for row in rows] for key in ("numbers", "target")}
    rewards = answer_reward(prompts=[row["prompt"] for row in rows], completions=completions, **columns)
    return sum(reward or 0.0 for reward in rewards) / len(rewards)


def test_the_skill_is_there_and_mostly_unused(model: Any) -> None:
    task = CountdownConfig(count=3, numbers="1-12", target="1-60", eval_size=150).build(0)
    rows = list(task.evaluation)
    prompts = [row["prompt"] for row in rows]
    free = complete(model, prompts, 40)
    assert 0.08 < accuracy(rows, free) < 0.25
    assert sum(format_reward(prompts=prompts, completions=free)) > 0.95 * len(free)
    # Made to begin as a worked answer does, it is right most of the time.
    worked = ["\n" + text for text in complete(model, [prompt + "\n" for prompt in prompts], 40)]
    assert accuracy(rows, worked) > 0.55


def test_it_answers_questions_at_length(model: Any) -> None:
    messages = [{"role": "user", "content": "I would like to know the capital of Sweden."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (text,) = complete(model, [prompt], 64)
    assert "Stockholm" in text
    assert len(tokenizer(text)["input_ids"]) > 20


def test_the_corpus_holds_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    countdown = importlib.import_module("recipes.tiny.countdown")
    rng = random.Random(0)
    problems = [countdown.draw_training_problem(rng) for _ in range(500)]
    assert not any(map(is_held_out, problems))
    rows: list[dict[str, Any]] = [
        {"prompt": countdown_prompt(p.numbers, p.target), "numbers": p.numbers, "target": p.target} for p in problems
    ]
    worked = [countdown.worked_answer(rng, problem) for problem in problems]
    hasty = [countdown.hasty_answer(rng, problem) for problem in problems]
    assert accuracy(rows, worked) == 1.0
    assert accuracy(rows, hasty) == 0.0
    prompts = [row["prompt"] for row in rows]
    assert format_reward(prompts=prompts * 2, completions=worked + hasty) == [1.0] * 1000
