"""Integer weights: exact there and back, the same for any threads, kept or made again what is carried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.es.strategy import Member, Update
from estune.weights import integers
from estune.weights.checkpoint import Checkpoint
from estune.weights.grid import Grid
from estune.weights.integers import IntegerWeights, Matrix
from estune.weights.rebuild import Steps
from tests.grids import Latent
from tests.models import save_model

GROUP = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_model(tmp_path_factory.mktemp("models") / "base", num_hidden_layers=1))


def opened(checkpoint: Checkpoint, bits: int = 8, carry_steps: int = 3, **options: Any) -> IntegerWeights:
    matrices = [
        Matrix(
            name,
            torch.zeros(t.shape[0], t.shape[1] * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8),
            torch.ones(t.shape[0], t.shape[1] // GROUP),
        )
        for name, t in checkpoint.tensors.items()
        if len(t.shape) == 2
    ]
    policy: Any = f"int{bits}"
    return IntegerWeights(matrices, checkpoint, policy=policy, grid=Grid(bits, GROUP, carry_steps), **options)


def codes(weights: IntegerWeights) -> list[Any]:
    return [matrix.codes.numpy().copy() for matrix in weights.matrices]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))


def updates(count: int) -> list[Update]:
    members = [(Member(10 * i, 1), Member(10 * i + 1, -1)) for i in range(count)]
    return [Update(i, each, (0.02, -0.03), rounding_seed=i, sigma=0.04) for i, each in enumerate(members)]


operations = st.lists(
    st.one_of(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from([1, 0, -1])), st.none()), max_size=8
)


@pytest.mark.parametrize("bits", [8, 4])
@given(history=operations)
@settings(max_examples=15)
def test_any_history_leaves_the_base_alone(checkpoint: Checkpoint, bits: int, history: Any) -> None:
    weights = opened(checkpoint, bits)
    before = codes(weights)
    fingerprint = weights.fingerprint()
    for operation in history:
        weights.restore() if operation is None else weights.perturb(Member(*operation), 0.5)
    if history and history[-1] and history[-1][1]:
        assert not same(codes(weights), before)
    assert weights.fingerprint() == fingerprint
    assert same(codes(weights), before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_updates_are_what_is_documented(checkpoint: Checkpoint, bits: int, rounding: Any) -> None:
    """Over two windows and a half; with a scale of one tensor's noise; kept or made again, and from files alone."""
    name = next(iter(n for n, t in checkpoint.tensors.items() if len(t.shape) == 2))
    scales = {name: 0.5}
    options: Any = {"rounding": rounding, "scales": scales}
    again = opened(checkpoint, bits, **options)
    kept = opened(checkpoint, bits, keep_error=True, threads=2, **options)
    made = updates(7)
    for number, update in enumerate(made):
        again.perturb(Member(number), 0.04)  # whatever was evaluated last must not leak into the update
        again.apply(update)
        kept.apply(update)
        assert same(codes(again), codes(kept))
    steps = Steps(again.rule, made)
    for matrix in again.matrices:
        tensor = checkpoint.tensors[matrix.name]
        alone = Latent(tensor.read(), matrix.name, GROUP, bits, 3, stochastic=rounding == "stochastic")
        if matrix.name == name:
            continue  # `Latent` knows no scales: Steps below has it
        for update in made:
            alone.take(update)
        (found,) = [np.concatenate(list(again.runs()[matrix.name]()))]
        np.testing.assert_array_equal(found, alone.values())
    for matrix in again.matrices:
        tensor = checkpoint.tensors[matrix.name]
        found = np.concatenate(list(again.runs()[matrix.name]()))
        np.testing.assert_array_equal(steps.rebuilt(tensor, 0, tensor.elements), found)
    assert steps.fingerprints(checkpoint, again.tensors)[-1] == again.fingerprint() == kept.fingerprint()


def test_runs_and_threads_do_not_change_the_bits(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def final(threads: int) -> list[Any]:
        weights = opened(checkpoint, 4, threads=threads)
        for update in updates(4):
            weights.apply(update)
        weights.perturb(Member(3, -1), 0.1)
        return codes(weights)

    whole = final(1)
    monkeypatch.setattr(integers, "RUN_LENGTH", 1024)
    assert same(final(3), whole)


def test_a_checkpoint_that_was_saved_is_loaded_to_the_bit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    weights = opened(checkpoint, 4)
    for update in updates(3):  # one window
        weights.apply(update)
    checkpoint.write(tmp_path / "saved", weights.runs(), "float32")
    other = opened(checkpoint, 4)
    other.load(Checkpoint(tmp_path / "saved"))
    for each in (weights, other):
        each.apply(updates(4)[3])
    assert same(codes(weights), codes(other))


def test_change_is_counted_from_the_base_on_the_grid(checkpoint: Checkpoint) -> None:
    weights = opened(checkpoint, 4)
    assert weights.change(checkpoint)[0] == 0.0
    before = {name: np.concatenate(list(read())) for name, read in weights.runs().items()}
    weights.apply(updates(1)[0])
    after = {name: np.concatenate(list(read())) for name, read in weights.runs().items()}
    difference = np.sqrt(sum(np.sum((after[n].astype(float) - before[n]) ** 2) for n in before))
    assert difference > 0
    assert weights.change(checkpoint) == pytest.approx(
        (difference, np.sqrt(sum(np.sum(b.astype(float) ** 2) for b in before.values())))
    )
