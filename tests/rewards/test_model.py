"""Reward models: one logit of a transformers classifier, as TRL computes it."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForSequenceClassification

from estune.completion import Completion, Rendering
from estune.errors import EstuneError
from estune.grading.convention import TrainerState
from estune.grading.grading import Grading
from estune.rewards.load import in_conversation, load_reward
from estune.rewards.model import RewardModel
from estune.tasks.base import as_message
from tests.models import build_config, build_tokenizer

PLAIN = [{"prompt": "one "}, {"prompt": "two, longer "}, {"prompt": "three "}]
COMPLETIONS = [Completion(text, [1], True) for text in ("a", "bcd efg", "hi")]


def build(labels: int = 1) -> Any:
    torch.manual_seed(0)
    return Qwen2ForSequenceClassification(build_config("qwen2", num_labels=labels)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-reward"
    build().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def logit(model: Any, text: str) -> float:
    """Of one text alone: no padding, no batch."""
    ids = torch.tensor([build_tokenizer()(text, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        return float(model(input_ids=ids).logits[0, 0])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_plain_text_is_concatenated_and_padding_changes_nothing(folder: Path, batch_size: int) -> None:
    reward = RewardModel(str(folder), batch_size=batch_size)
    with Grading([reward]) as grading:
        grades = grading.grade(PLAIN, COMPLETIONS)
    expected = [logit(build(), row["prompt"] + c.text) for row, c in zip(PLAIN, COMPLETIONS, strict=True)]
    assert grades.scores == {"tiny-reward": pytest.approx(expected, abs=1e-4)}
    assert len({round(x, 3) for x in expected}) == 3


def test_conversations_are_rendered_by_its_own_template(folder: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "one"}]}]
    with Grading([RewardModel(build(), build_tokenizer())]) as grading:
        (score,) = grading.grade(rows, COMPLETIONS[:1]).total
    assert score == pytest.approx(logit(build(), "<|user|>one<|end|><|assistant|>a"), abs=1e-4)


def test_a_template_is_told_the_date_and_the_options_of_the_run() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    state = TrainerState(rendering=Rendering(date(2024, 7, 26), {"mood": "!"}))
    with Grading([RewardModel(build(), tokenizer)], state=state) as grading:
        (score,) = grading.grade([{"prompt": [{"role": "user", "content": "one"}]}], COMPLETIONS[:1]).total
    assert score == pytest.approx(logit(build(), "2024!onea"), abs=1e-4)


def test_text_that_is_shown_as_a_conversation_is_one_here_too() -> None:
    reward = in_conversation(RewardModel(build(), build_tokenizer()), as_message)
    with Grading([reward]) as grading:
        (score,) = grading.grade([{"prompt": "one"}], COMPLETIONS[:1]).total
    assert score == pytest.approx(logit(build(), "<|user|>one<|end|><|assistant|>a"), abs=1e-4)


def test_a_name_a_directory_and_a_model_all_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Qwen2ForSequenceClassification.from_pretrained(folder)
    monkeypatch.chdir(folder.parent)
    for given in (str(folder), "tiny-reward", loaded):
        function: Any = load_reward(given)
        assert function.__name__ == "tiny-reward"
        assert function(prompts=["one "], completions=["a"]) == [pytest.approx(logit(build(), "one a"), abs=1e-4)]


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="has 2 labels; give a sequence classifier with one"):
        RewardModel(build(labels=2), build_tokenizer())
    tokenizer = build_tokenizer(pad=False)
    tokenizer.eos_token = None
    with pytest.raises(EstuneError, match="no token to pad with"):
        RewardModel(build(), tokenizer)
    with pytest.raises(EstuneError, match="reward my/own.py is a file: name its function, my/own.py:FUNCTION"):
        load_reward("my/own.py")
    with pytest.raises(EstuneError, match=f"reward model {tmp_path} cannot be loaded"):
        load_reward(str(tmp_path))
