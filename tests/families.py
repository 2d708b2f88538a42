"""Small models of every family that transformers knows, and what shows that one trains."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import estune
from estune.completion import Sampling
from estune.engines.generate import UNCACHED
from estune.engines.loading import kind_of, load_model
from estune.engines.transformers import TransformersEngine
from estune.es.evolution import EvolutionStrategy
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.run.trainer import Trainer
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import trained_parameters
from estune.weights.places import check_places
from estune.weights.rebuild import Steps
from estune.weights.weights import Weights
from tests.family_configs import tiny_config
from tests.models import build_tokenizer
from tests.runs import make_config, make_task

PROMPTS = [[40 + 3 * (place + length) % 131 for place in range(length)] for length in (5, 9, 9, 14)]
"""Token ids of prompts, of lengths of which two are equal."""


def save_family(folder: Path, family: str) -> Path:
    """Write a small random model of a family with a tokenizer; return the directory."""
    config = tiny_config(family)
    return save_random(folder, kind_of(config), config)


def save_random(folder: Path, kind: Any, config: Any) -> Path:
    """Write a random model of a configuration with a tokenizer; return the directory."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = kind.from_config(config).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def completed(model: Path, tokens: int = 8) -> list[list[int]]:
    """What transformers' `generate` makes of each of `PROMPTS`, alone and by the largest logits."""
    plain = load_model(model, "auto", torch.device("cpu"))
    plain.generation_config = GenerationConfig(
        max_new_tokens=tokens, pad_token_id=0, use_cache=plain.config.model_type not in UNCACHED
    )
    return [plain.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in PROMPTS]


def complete_and_compare(model: Path, expected: Sequence[list[int]]) -> None:
    """Check that the engine completes `PROMPTS`, side by side, as `generate` did."""
    found = TransformersEngine(model).generate(PROMPTS, Sampling(len(expected[0])))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs[: len(ours.token_ids)], "the completions are not those of `generate`"


def update_and_compare(folder: Path, model: Path) -> Checkpoint:
    """Update weights twice, and check that they are, under the checkpoint's names, what files alone come to.

    Returns:
        What they are written as.
    """
    base = Checkpoint(model)
    loaded = load_model(model, "auto", torch.device("cpu"))
    parameters = trained_parameters(loaded, base.tensors)
    check_places(parameters, base)
    held = {p.tensor.untyped_storage().data_ptr() for p in parameters}
    assert all(p.untyped_storage().data_ptr() in held for p in loaded.parameters())

    weights = Weights(parameters, policy="copy")
    strategy = EvolutionStrategy(population=2, sigma=0.1)
    updates = [strategy.tell([0.0, 1.0]) for _ in range(2)]
    for update in updates:
        weights.perturb(update.members[0], 0.1)
        weights.apply(update)
    weights.restore()
    base.write(folder / "ours", weights.runs(), "float32")

    rebuilt: list[str] = []
    Steps(weights.rule, updates).write(base, weights.tensors, folder / "rebuilt", "float32", rebuilt.append)
    assert rebuilt == [weights.fingerprint()]
    ours, theirs = Checkpoint(folder / "ours"), Checkpoint(folder / "rebuilt")
    assert ours.content_hash() == theirs.content_hash()
    assert {n: t.shape for n, t in ours.tensors.items()} == {n: t.shape for n, t in base.tensors.items()}
    again = load_model(folder / "ours", "auto", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
    return ours


def train_and_compare(folder: Path, model: Path, rows: Sequence[dict[str, Any]] = (), **changes: Any) -> Checkpoint:
    """Train two steps, and check what they leave behind: exact weights under the checkpoint's own names and shapes.

    Args:
        folder: where the run is written.
        model: the model's directory.
        rows: to train on, of which the first two are held out.
        changes: to the run's settings.

    Returns:
        The checkpoint of the last step.
    """
    config = make_config(folder / "run", model, **{"steps": 2, "population": 2, "prompts_per_step": 2, **changes})
    counted = itertools.count()

    def later(completions: list[str], **_: Any) -> list[float]:
        """A reward that differs, also where random models write the same."""
        return [float(next(counted)) for _ in completions]

    task = make_task(later)
    if rows:
        task = replace(task, train=rows[2:], evaluation=rows[:2])
    Trainer(config, task=task, monitors=[]).train()
    base, final = Checkpoint(model), Checkpoint(folder / "run" / "final")
    assert {n: t.shape for n, t in final.tensors.items()} == {n: t.shape for n, t in base.tensors.items()}
    trained = Journal.read(folder / "run").header.tensors
    still = [n for n in trained if (final.tensors[n].stored() == base.tensors[n].stored()).all()]
    assert not still, f"not moved: {still}"

    replay(folder / "run", folder / "replayed")  # from files alone, which refuses another fingerprint
    assert Checkpoint(folder / "replayed").content_hash() == final.content_hash()
    # What is trained is what the checkpoint loads as.
    ours = estune.load(folder / "run").state_dict()
    theirs = load_model(final.path, "auto", torch.device("cpu")).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    return final


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the work takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
