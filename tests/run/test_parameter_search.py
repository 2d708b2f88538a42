"""Parameter search driven from outside: islands on shared engines, gone on with, and strategies of one's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from estune.completion import Completion
from estune.errors import EstuneError
from estune.es.evolution import EvolutionStrategy
from estune.es.strategy import Member, Update
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.noise import reference
from estune.run.parameter_search import Engines, ParameterSearch
from estune.weights.weights import Weights
from tests.runs import PROMPTS, make_config, variety


@pytest.fixture(scope="module")
def engines(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with Engines(make_config(tmp_path_factory.mktemp("none"), model, momentum=0.5, learning_rate=0.02)) as found:
        yield found


def scores(completions: Sequence[Completion]) -> float:
    return float(np.mean(variety([c.text for c in completions])))


def step(search: ParameterSearch) -> Update:
    members = search.ask()
    return search.tell([scores(each) for each in search.evaluate(members, PROMPTS[:4])])


def texts(completions: Sequence[Completion]) -> list[str]:
    return [c.text for c in completions]


def test_islands_in_turns_are_what_they_are_alone(engines: Engines, tmp_path: Path) -> None:
    islands = [ParameterSearch(engines, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for _ in range(3):
        for island in islands:
            step(island)
    alone = ParameterSearch(engines, tmp_path / "alone", seed=1)
    updates = [step(alone) for _ in range(3)]
    assert [record.update for record in islands[1].journal.steps] == updates
    assert islands[0].journal.fingerprint() != islands[1].journal.fingerprint() == alone.journal.fingerprint()
    assert texts(islands[1].complete(PROMPTS[:4])) == texts(alone.complete(PROMPTS[:4]))

    heir = ParameterSearch(engines, tmp_path / "heir", start=islands[0])
    assert heir.journal.header.fingerprint == islands[0].journal.fingerprint()
    seeds = {m.seed for record in islands[0].journal.steps for m in record.update.members}
    assert seeds.isdisjoint(m.seed for m in heir.ask())
    step(heir)
    saved = heir.save(tmp_path / "saved")
    for each in (*islands, alone, heir):
        each.close()
    assert replay(tmp_path / "heir", tmp_path / "replayed") == heir.journal.fingerprint()
    assert (tmp_path / "replayed" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_a_search_goes_on_where_it_was(engines: Engines, tmp_path: Path) -> None:
    with ParameterSearch(engines, tmp_path / "whole") as whole:
        updates = [step(whole) for _ in range(4)]
        means = [np.mean([r for r in record.rewards if r is not None]) for record in whole.journal.steps]
        assert whole.best == (int(np.argmax(means)) + 1, pytest.approx(max(means)))
    first = ParameterSearch(engines, tmp_path / "cut")
    assert first.best is None
    for _ in range(2):
        step(first)
    first.journal.close()  # as where its process is killed: nothing says that it has ended
    with ParameterSearch(engines, tmp_path / "cut") as again:
        assert [step(again) for _ in range(2)] == updates[2:]
    assert Journal.read(tmp_path / "cut").fingerprint() == whole.journal.fingerprint()


class Halving:
    """A strategy of one's own: two members, and a step toward the better one, half as long each time."""

    seed = 5
    sigma = 0.05

    def __init__(self) -> None:
        self.step = 0

    @property
    def learning_rate(self) -> float:
        return 0.5 ** (self.step + 2)

    def ask(self, step: int | None = None) -> list[Member]:
        return [Member(1 + 2 * self.step), Member(2 + 2 * self.step)]

    def tell(self, rewards: Sequence[float | None]) -> Update:
        better = int(rewards[1] > rewards[0])  # type: ignore[operator]
        coefficients = tuple(self.learning_rate * (i == better) for i in range(2))
        update = Update(self.step, tuple(self.ask()), coefficients)
        self.step += 1
        return update

    def state(self) -> dict[str, Any]:
        return {}

    def recall(self, updates: Sequence[Update], state: dict[str, Any]) -> None:
        self.step = len(updates)


def test_any_strategy_will_do(engines: Engines, tmp_path: Path) -> None:
    with ParameterSearch(engines, tmp_path / "run", strategy=Halving()) as search:
        for _ in range(3):
            step(search)
    journal = Journal.read(tmp_path / "run")
    records = journal.steps
    assert journal.shortfall() is None
    assert [sum(record.update.coefficients) for record in records] == [0.25, 0.125, 0.0625]
    assert [record.sigma for record in records] == [Halving.sigma] * 3  # which an update of its own need not say
    assert replay(tmp_path / "run", tmp_path / "replayed") == search.journal.fingerprint()


def test_a_search_over_another_model_is_refused(engines: Engines, tmp_path: Path, model: Path) -> None:
    ParameterSearch(engines, tmp_path / "run").close()
    other = make_config(tmp_path, model, weights="copy", dtype="bfloat16")
    with Engines(other) as others, pytest.raises(EstuneError, match="run: its base weights: float32; here: bfloat16"):
        ParameterSearch(others, tmp_path / "run")


def test_any_module_can_be_perturbed_and_updated(caplog: pytest.LogCaptureFixture) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    module[2].weight = torch.nn.Parameter(torch.randn(3, 4))
    module.register_module("tied", torch.nn.Linear(3, 4, bias=False))
    module.tied.weight = module[0].weight
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    weights = Weights.of(module)
    assert weights.tensors == {"0.weight": ["tied.weight"], "0.bias": [], "2.weight": [], "2.bias": []}
    strategy = EvolutionStrategy(population=2, sigma=0.5)
    member = strategy.ask()[0]
    weights.perturb(member, 0.5)
    for name, tensor in module.named_parameters():
        noise = reference.normal_by_id(member.seed, reference.tensor_id(name), 0, tensor.numel())
        expected = before[name] + torch.from_numpy(np.float32(0.5) * noise).view_as(tensor)
        torch.testing.assert_close(tensor.detach(), expected, rtol=0, atol=0)
    weights.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_parameters())
    with caplog.at_level(logging.WARNING):
        weights.apply(strategy.tell([0.0, 1.0]))
    weights.restore()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in module.named_parameters())
