"""Members that begin before the last update is made: the journal says which, and each reward is that base's."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from estune.engines.tokenizer import open_encoder
from estune.errors import EstuneError
from estune.es.strategy import member_seed
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.base import EVALUATION_BATCH
from estune.pool.local import LocalPool, open_local_pool
from estune.pool.replica import Replica
from estune.run.held_out import token_ids
from estune.run.make import make_sampling
from estune.run.monitors.base import Monitor, Request
from estune.run.trainer import Trainer
from tests.runs import make_config, make_task, variety

CHANGES = {"steps": 6, "population": 5, "eval_steps": 3, "replicas": 2, "max_staleness": 1, "dtype": "float32"}


def assert_rewards_are_those_of_the_bases_named(run: Path, model: Path) -> list[int]:
    """Evaluate every member of the journal again, alone, at the base that the journal names; their stalenesses."""
    journal = Journal.read(run)
    config = make_config(run, model, dtype="float32")
    replica = Replica(config)
    task = make_task()
    encoder = open_encoder(config)
    found: list[int] = []
    for record in journal.steps:
        rows = [task.train[i] for i in record.prompts]
        sampling = make_sampling(config, member_seed(config.seed, record.step, 1 << 23))
        staleness = record.staleness or [0] * len(record.rewards)
        for stale in sorted(set(staleness)):
            replica.rebuild([each.update for each in journal.steps[: record.step - stale]])
            for member, reward, its in zip(record.update.members, record.rewards, staleness, strict=True):
                if its == stale:
                    done = replica.evaluate(member, record.sigma, token_ids(encoder, task, rows), sampling)
                    values = variety([c.text for c in done.completions])
                    assert reward == pytest.approx(sum(values) / len(values), abs=1e-12)
        found += staleness
    return found


def test_each_reward_is_that_of_the_base_that_the_journal_names(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Members that are asked ahead of time are perturbed by the sigma of then.
    changes = {**CHANGES, "sigma_scheduler_type": "linear"}
    Trainer(make_config(run, model, **changes), task=make_task(), monitors=[]).train()
    stale = assert_rewards_are_those_of_the_bases_named(run, model)
    assert 0 < sum(stale) < len(stale)
    journal = Journal.read(run)
    for record in journal.steps:
        members = record.staleness or [0]
        assert record.metrics["staleness"] == sum(members) / len(members)
    # Nobody begins ahead of an evaluation, and the first step has nothing before it.
    assert not any(journal.steps[step].staleness for step in (0, 3))
    assert replay(run, tmp_path / "replayed") == journal.fingerprint()


def test_without_it_the_journal_has_no_word_of_it(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(make_config(run, model, **CHANGES | {"max_staleness": 0}), task=make_task(), monitors=[]).train()
    assert b"staleness" not in b"".join((run / "journal.jsonl").read_bytes().splitlines()[1:])


class Asking(Monitor):
    """Asks for something after the second step."""

    def __init__(self, request: Request) -> None:
        self.request: Request = request
        self.step = 0

    def on_step_end(self, metrics: Any, sample: Any) -> None:
        self.step = int(metrics["step"])

    def requests(self) -> tuple[Request, ...]:
        return (self.request,) if self.step == 2 else ()


@pytest.mark.parametrize("request_", ["evaluate", "save", "stop"])
def test_what_was_begun_ahead_is_dropped_where_the_base_is_wanted(
    model: Path, tmp_path: Path, request_: Request
) -> None:
    run = tmp_path / "run"
    trainer = Trainer(make_config(run, model, **CHANGES), task=make_task(), monitors=[Asking(request_)])
    trainer.train()
    journal = Journal.read(run)
    assert len(journal.steps) == (2 if request_ == "stop" else 6)
    assert not any(record.staleness for record in journal.steps[2:3])
    assert_rewards_are_those_of_the_bases_named(run, model)
    if request_ == "evaluate":  # as an evaluation of those weights, whoever was at work before
        weights = replay(run, tmp_path / "at-2", 2)
        assert weights == journal.steps[1].fingerprint
        alone = Trainer(
            make_config(tmp_path / "alone", tmp_path / "at-2", steps=0, dtype="float32"), task=make_task(), monitors=[]
        ).train()
        found = next(e for e in journal.evaluations if e.step == 2)
        assert found.metrics["eval_reward"] == alone.before["eval_reward"]


def test_it_goes_on_after_a_kill_of_a_replica_in_the_middle(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = Trainer(make_config(run, model, worker_timeout=5, **CHANGES), task=make_task(), monitors=[])
    pool = trainer.pool
    assert isinstance(pool, LocalPool)
    worker: Any = pool.replicas[1]
    killed: list[int] = []
    apply = pool.apply

    def kill_and_apply(update: Any) -> str:
        """While others are at work on members ahead, and the lost one's share is to be updated."""
        if update.step in {0, 3}:
            killed.append(worker.process.pid)
            threading.Timer(0.005 * update.step, os.kill, (killed[-1], signal.SIGKILL)).start()
        return apply(update)

    pool.apply = kill_and_apply  # type: ignore[method-assign]
    trainer.train()
    assert len(set(killed)) == 2
    stale = assert_rewards_are_those_of_the_bases_named(run, model)
    assert any(stale)


def test_a_run_is_resumed_with_and_without(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer(make_config(run, model, **CHANGES | {"steps": 3}), task=make_task(), monitors=[]).train()
    Trainer.resume(run, steps=5, max_staleness=0, task=make_task(), monitors=[]).train()
    Trainer.resume(run, steps=8, max_staleness=1, task=make_task(), monitors=[]).train()
    assert not any(record.staleness for record in Journal.read(run).steps[3:6])
    assert any(record.staleness for record in Journal.read(run).steps[6:])
    assert_rewards_are_those_of_the_bases_named(run, model)


def test_members_are_taken_in_the_order_in_which_they_were_given(model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", model, threads=1, replicas=2, device="cpu")
    pool = open_local_pool(config)
    try:
        assert EVALUATION_BATCH > 3
        sampling = make_sampling(config, 1)
        from estune.es.strategy import Member, Update

        first = pool.evaluate([Member(1), Member(2), Member(3)], 0.02, [[5, 6]] * 3, sampling)
        ahead = pool.evaluate([Member(4), Member(5), Member(6)], 0.02, [[5, 6]] * 3, sampling)
        assert {done.updates for _, done in first} == {0}
        pool.apply(Update(0, (Member(3),), (0.25,)))
        ahead.close()
        assert {done.updates for _, done in pool.evaluate([Member(4)], 0.02, [[5, 6]], sampling)} == {1}
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_staleness": 1, "weights": "exact_inplace"}, "max_staleness must be 0"),
        ({"max_staleness": 2}, "max_staleness"),
        ({"async": 1}, "here it is max_staleness"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    from estune.config.config import load

    with pytest.raises(EstuneError, match=said):
        load(None, [f"{key}={value}" for key, value in changes.items()])
