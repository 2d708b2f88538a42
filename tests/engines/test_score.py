"""Log-probabilities of completions against one plain forward a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from estune.completion import Sampling
from estune.engines.score import divergence, log_probabilities
from estune.engines.transformers import TransformersEngine
from tests.families import save_family
from tests.models import RECURRENT, build_model, save_model

PROMPTS = [[7, 8, 9, 10, 11], [20], [30, 31, 32]]
COMPLETIONS = [[40, 41], [50, 51, 52, 53, 54, 55], [60]]


def plainly(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> list[float]:
    logits = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return [float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(completion)]


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gpt2", "gemma", *sorted(RECURRENT)])
@pytest.mark.parametrize("logits", [1, 6000, 10**9])
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_as_one_forward_a_row(name: str, logits: int) -> None:
    model = build_model(name)
    found = log_probabilities(model, PROMPTS, COMPLETIONS, logits)
    for prompt, completion, row in zip(PROMPTS, COMPLETIONS, found, strict=True):
        assert row == pytest.approx(plainly(model, prompt, completion), abs=2e-4)


def test_a_long_text_does_not_turn_the_angles_of_short_ones() -> None:
    model = build_model("phi3_longrope")
    prompts = [[7, 8, 9, 10, 11], list(range(20, 50)), list(range(20, 80))]
    found = log_probabilities(model, prompts, COMPLETIONS, 10**9)  # of 7, 36 and 61 tokens: short ones have up to 32
    for prompt, completion, row in zip(prompts, COMPLETIONS, found, strict=True):
        assert row == pytest.approx(plainly(model, prompt, completion), abs=2e-4)


@pytest.mark.parametrize("save", [save_model, partial(save_family, family="roberta")], ids=["qwen2", "roberta"])
def test_scores_are_those_by_which_generate_chooses(save: Callable[[Path], Path], tmp_path: Path) -> None:
    """Of RoBERTa, too, which begins to number positions elsewhere where it is given none."""
    path = save(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    chosen, expected = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
        chosen.append(out.sequences[0, len(prompt) :].tolist())
        logs = torch.cat(out.logits).double().log_softmax(-1)
        expected.append([float(row[token]) for row, token in zip(logs, chosen[-1], strict=True)])
    for found, wanted in zip(TransformersEngine(path).score(PROMPTS, chosen), expected, strict=True):
        assert found == pytest.approx(wanted, abs=2e-4)


def test_greedy_completions_are_the_likeliest(tmp_path: Path) -> None:
    engine = TransformersEngine(save_model(tmp_path / "model"))
    chosen = [c.token_ids for c in engine.generate(PROMPTS, Sampling(6))]
    first = [row[0] for row in engine.score(PROMPTS, chosen)]
    for token in range(3, 300, 11):
        for i, row in enumerate(engine.score(PROMPTS, [[token]] * 3)):
            assert row[0] <= first[i] + 1e-5


def test_divergence_is_that_of_the_distributions() -> None:
    """k3 over draws from p tends to KL(p || q), and is 0 where they are equal."""
    torch.manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    drawn = torch.multinomial(p, 200_000, replacement=True)
    exact = float((p * (p / q).log()).sum())
    rows = [p.log()[drawn].tolist()], [q.log()[drawn].tolist()]
    assert divergence(*rows) == pytest.approx(exact, rel=0.03)
    assert divergence(rows[0], rows[0]) == 0.0
    assert divergence([[0.0]], [[-5.0]]) == pytest.approx(math.exp(-5) - 1 + 5)
    assert divergence([[0.0], [0.0]], [[-5.0], [701.0]]) == math.inf
    assert math.isnan(divergence([[]], [[]]))
