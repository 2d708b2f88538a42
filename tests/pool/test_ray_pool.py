"""Workers on Ray: the same run whoever does it, weights that are what they must be, and little on the wire."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.base import Evaluated
from estune.pool.crewed import minority
from estune.pool.deadlines import Deadlines
from estune.pool.local import LocalPool
from estune.pool.ray.cluster import cluster_device, connect, join
from estune.pool.ray.pool import RayPool, slots_of_worker
from estune.pool.ray.worker import RayWorker
from estune.pool.replica import Replica
from estune.pool.slots import compare
from estune.pool.worker import StaleWeights
from estune.run.trainer import Trainer
from estune.study.probe import probe
from tests.processes import until
from tests.rays import with_workers
from tests.run.test_guard import assert_harm_is_taken_back
from tests.run.test_search import ALL, GUIDED, MOMENTS, SHARPNESS
from tests.run.test_staleness import assert_rewards_are_those_of_the_bases_named
from tests.runs import assert_same_run, make_config, make_task, slow_variety, substance, train

SAMPLING = Sampling(8)
PROMPTS = [[10, 20, 30], [40, 50], [60, 70, 80, 90]]


def update(step: int) -> Update:
    return Update(step, (Member(step), Member(99)), (0.25, -0.5))


@pytest.fixture(scope="module")
def alone(model: Path) -> LocalPool:
    """One replica in this process, to compare with."""
    return LocalPool(Replica(make_config(Path("unused"), model, threads=1, device="cpu")))


@pytest.fixture(scope="module")
def pool(cluster: Any, model: Path) -> Iterator[RayPool]:
    config = make_config(Path("unused"), model, replicas=1, threads=1, device="cpu", workers=2)
    connect(config)
    pool = RayPool(config)
    until(lambda: len(pool.crew.ready()) == 2, 600)  # on busy cores it takes them minutes to import torch
    yield pool
    pool.close()


def inside(pool: RayPool, number: int, work: Any) -> Any:
    """Do something in a worker's process."""
    handle = pool.crew.slots[number].handle
    assert handle is not None
    return ray.get(handle.actor.__ray_call__.remote(work))


def agree(pool: RayPool, alone: LocalPool) -> bool:
    """Make the next update in both pools; whether they end at the same weights."""
    next_one = update(len(pool.crew.weights.history))
    return pool.apply(next_one) == alone.apply(next_one)


def test_workers_do_what_a_replica_does(pool: RayPool, alone: LocalPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool.describe() == alone.describe()
    members = [Member(seed, sign) for seed in range(3) for sign in (1, -1)]
    found = dict(pool.evaluate(members, 0.02, PROMPTS, SAMPLING))
    expected = dict(alone.evaluate(members, 0.02, PROMPTS, SAMPLING))
    assert [found[i].completions for i in range(6)] == [expected[i].completions for i in range(6)]
    assert found[0].completions != found[2].completions
    assert agree(pool, alone)
    answers = [[5, 6, 7]] * len(PROMPTS)
    assert pool.compare(PROMPTS, answers) == alone.compare(PROMPTS, answers)
    monkeypatch.setattr("estune.pool.base.EVALUATION_BATCH", 2)  # so that there are two batches
    for sampling in (SAMPLING, replace(SAMPLING, temperature=1.0, seed=5)):
        assert pool.generate(PROMPTS, sampling) == alone.generate(PROMPTS, sampling)


def test_workers_take_some_members_at_once(pool: RayPool, alone: LocalPool, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [Member(seed, sign) for seed in range(3) for sign in (1, -1)] + [Member(7)]
    before = pool.progress().tokens
    monkeypatch.setattr(pool, "members_at_once", lambda: 3)
    found = dict(pool.evaluate(members, 0.02, PROMPTS, SAMPLING))
    expected = dict(alone.evaluate(members, 0.02, PROMPTS, SAMPLING))
    assert sorted(found) == list(range(7))
    assert {i: e.completions for i, e in found.items()} == {i: e.completions for i, e in expected.items()}
    assert all(each.updates == len(pool.crew.weights.history) for each in found.values())
    written = sum(len(c.token_ids) for each in found.values() for c in each.completions)
    assert pool.progress().tokens - before == written


@pytest.mark.parametrize(
    ("changes", "adapted", "members"),
    [
        ({}, False, 3),
        ({"noise": "iid"}, False, 1),
        ({"noise": "iid"}, True, 3),
        ({"train_parameters": "*"}, False, 3),
        ({"train_parameters": "*norm*"}, False, 1),
        ({"engine": "transformers"}, False, 1),
    ],
)
def test_workers_of_vllm_are_given_as_many_members_as_have_slots(
    model: Path, changes: dict[str, Any], adapted: bool, members: int
) -> None:
    config = Config(model=str(model), device="cpu", engine="vllm", noise="rank1", train_parameters="*_proj.weight")
    changed = config.model_copy(update={"vllm_max_loras": 3, **changes})
    assert slots_of_worker(changed, adapted=adapted) == members


@pytest.mark.parametrize(("workers", "by_value"), [(1, 90_000), (3, 0)])
def test_the_number_of_workers_changes_nothing(
    cluster: Any,
    model: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    by_value: int,
) -> None:
    """Nor whether prompts go along with a call, as a usual step's do, or through Ray's object store."""
    monkeypatch.setattr("estune.pool.ray.pool.BY_VALUE", by_value)
    put: list[object] = []
    stored = ray.put

    def counted(value: object) -> Any:
        put.append(value)
        return stored(value)

    monkeypatch.setattr(ray, "put", counted)
    run = tmp_path / "run"
    trainer = with_workers(run, model, workers, save_steps=2)
    trainer.pool.wait_for_workers(60)
    assert len(trainer.pool.crew.ready()) == workers
    trainer.train()
    assert_same_run(run, undisturbed)
    assert bool(put) == (by_value == 0)


def test_workers_that_keep_no_base_take_the_steps_of_one_that_does(cluster: Any, model: Path, tmp_path: Path) -> None:
    options: Any = {"dtype": "bfloat16", "rounding": "stochastic", "steps": 2}
    with_workers(tmp_path / "run", model, 2, weights="exact_inplace", **options).train()
    Trainer(
        make_config(tmp_path / "alone", model, weights="copy", **options), task=make_task(slow_variety), monitors=[]
    ).train()
    found, expected = (Journal.read(tmp_path / name).steps for name in ("run", "alone"))
    assert [substance(record) for record in found] == [substance(record) for record in expected]


def test_a_worker_with_corrupted_weights_makes_them_anew(
    pool: RayPool, alone: LocalPool, caplog: pytest.LogCaptureFixture
) -> None:
    assert agree(pool, alone)

    def flip(worker: RayWorker) -> None:
        next(iter(worker.replica.weights.base.values()))[0] += 1

    inside(pool, 1, flip)
    assert agree(pool, alone)
    assert "differ, and are made anew" in caplog.text
    assert inside(pool, 1, lambda worker: worker.replica.weights.fingerprint()) == pool.describe().fingerprint


def test_a_machine_that_is_never_right_stops_the_run(
    pool: RayPool, alone: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pool.crew.weights
    monkeypatch.setattr(pool.crew, "ask", lambda slots, *_: {slot: f"{slot.number}" for slot in slots})
    with pytest.raises(EstuneError, match="no sound machine does that"):
        pool.apply(update(99))
    assert pool.crew.weights is before


def test_stale_weights_are_refused_and_made_anew(
    pool: RayPool, alone: LocalPool, caplog: pytest.LogCaptureFixture
) -> None:
    assert agree(pool, alone)
    done = len(pool.crew.weights.history)

    def go_back(worker: RayWorker) -> None:
        worker.done -= 1

    for number in range(2):
        inside(pool, number, go_back)
    handle = pool.crew.slots[0].handle
    assert handle is not None
    with pytest.raises(StaleWeights):
        handle.call("generate", done, PROMPTS, SAMPLING)
    assert pool.generate(PROMPTS, SAMPLING) == alone.generate(PROMPTS, SAMPLING)
    assert "has other weights than the run" in caplog.text


def test_an_update_asked_for_twice_is_made_once(pool: RayPool, alone: LocalPool) -> None:
    assert agree(pool, alone)
    history, fingerprint = pool.crew.weights.history, pool.describe().fingerprint
    handle = pool.crew.slots[0].handle
    assert handle is not None
    assert handle.call("apply", len(history) - 1, history[-1]) == fingerprint
    assert handle.call("apply", len(history) - 1, history[-1]) == fingerprint


def test_weights_are_written_by_a_worker_here_or_by_replay(
    pool: RayPool, alone: LocalPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert agree(pool, alone)
    alone.save(tmp_path / "expected", "float32")
    pool.save(tmp_path / "worker", "float32")
    assert pool.crew.checkpoint == (len(pool.crew.weights.history), tmp_path / "worker")
    monkeypatch.setattr(pool.crew, "ask", lambda *_: {})  # as where no worker is on this machine
    pool.save(tmp_path / "replay", "float32")
    expected = (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert (tmp_path / "worker" / "model.safetensors").read_bytes() == expected
    assert (tmp_path / "replay" / "model.safetensors").read_bytes() == expected


def test_workers_probe_as_a_replica_does(cluster: Any, model: Path) -> None:
    sizes: Any = {"task": make_task(), "sigmas": [1e-7, 0.02, 0.3], "members": 3}
    found = probe(make_config(Path("unused"), model, replicas=None, workers=2), **sizes)
    assert found == probe(make_config(Path("unused"), model), **sizes)
    assert found.levels[1].spread > 0


def test_what_a_member_costs_on_the_wire(pool: RayPool) -> None:
    prompts = ray.put(PROMPTS)
    asked = pickle.dumps((12, Member(2**64 - 1, -1), 0.001, prompts.hex(), SAMPLING))
    result = pickle.dumps(Evaluated([Completion("", [], True)] * len(PROMPTS), 0.123, 4.567))
    step = pickle.dumps((12, Update(12, tuple(Member(2**64 - 1 - i) for i in range(30)), (1.1e-5,) * 30)))
    assert len(asked) + len(result) < 1000
    assert len(step) < 2000


def test_a_strategys_parts_give_the_bits_of_one_process(cluster: Any, model: Path, tmp_path: Path) -> None:
    bounded = {"constraint": "kl<=0.001", "back_to_best": 0.0, "eval_steps": 1}
    changes = {"all": {}, "sharpness": SHARPNESS, "adam": MOMENTS, "guided": GUIDED, "bounded": bounded}
    for name, more in changes.items():
        parts = ALL | more
        one = train(tmp_path / name, model, **parts)
        assert one == train(tmp_path / f"{name} with workers", model, **parts | {"replicas": None, "workers": 2})


def test_a_step_that_harms_is_taken_back_by_workers_too(cluster: Any, model: Path, tmp_path: Path) -> None:
    assert_harm_is_taken_back(model, tmp_path, {"replicas": None, "workers": 2})


def test_the_majority_is_right_and_a_tie_has_none() -> None:
    assert minority({1: "a"}) == minority({1: "a", 2: "a"}) == []
    assert minority({1: "a", 2: "b", 3: "a"}) == [2]
    assert minority({1: "a", 2: "b"}) == [1, 2]


def test_a_worker_loads_nothing_before_it_must() -> None:
    code = "import sys, estune.pool.ray.worker; print(*{'torch', 'transformers', 'datasets', 'numba'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "\n"


def test_a_worker_that_differs_is_named() -> None:
    with pytest.raises(EstuneError, match="worker 3 differs from the others: its dtype is bfloat16, theirs float32"):
        compare("worker 3", {"dtype": "bfloat16"}, {"dtype": "float32"})  # type: ignore[arg-type]


def test_deadlines_follow_experience() -> None:
    deadlines = Deadlines(None)
    assert deadlines.of("evaluate") == 600
    for seconds in (20.0, 30.0, 1000.0):
        deadlines.took("evaluate", seconds)
    assert deadlines.of("evaluate") == 300
    deadlines.took("apply", 0.01)
    assert deadlines.of("apply") == 60
    assert Deadlines(5.0).of("evaluate") == 5


def test_a_cluster_that_is_not_there_is_one_line(model: Path) -> None:
    with pytest.raises(EstuneError, match=r"ray_address 127.0.0.1:9: .*refused; give HOST:PORT"):
        join("127.0.0.1:9", {})
    with pytest.raises(EstuneError, match="ray_address nowhere: .*give HOST:PORT"):
        join("nowhere", {})


def test_where_workers_run(cluster: Any, model: Path) -> None:
    config = make_config(Path("unused"), model, replicas=None, workers=1, ray_address=cluster.address)
    assert cluster_device(config) == "cpu"


def test_an_error_of_all_workers_is_raised_as_it_is(pool: RayPool) -> None:
    """They are replaced all the same: after an error a device can be out of order. Last, as that takes time."""
    handles = [slot.handle for slot in pool.crew.slots]
    with pytest.raises(AttributeError, match="NoneType"):
        list(pool.evaluate([None], 0.02, PROMPTS, SAMPLING))  # type: ignore[list-item]
    pool.crew.wait(lambda: not any(slot.handle in handles for slot in pool.crew.slots) or None)


def test_members_of_the_next_step_begin_while_the_last_are_at_work(cluster: Any, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = with_workers(run, model, 2, steps=6, population=5, max_staleness=1, dtype="float32")
    trainer.pool.wait_for_workers(60)
    trainer.train()
    stale = assert_rewards_are_those_of_the_bases_named(run, model)
    assert any(stale)
    assert replay(run, tmp_path / "replayed") == Journal.read(run).fingerprint()
