"""Where a replica runs and keeps its base, by its settings and the machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from estune.config import Config
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.pool.generators import open_generators
from estune.pool.open import with_resources, with_resources_to_generate
from estune.pool.replica import Replica, less_base, wants_base_on_host
from estune.run.make import make_sampling
from estune.weights.device import training_device
from estune.weights.parameters import Parameter
from tests.models import FUSABLE, save_model
from tests.runs import make_config


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA, as far as asking for it goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_auto_is_cuda_where_there_is_one_and_never_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert training_device("auto") == torch.device(expected)
    assert training_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(EstuneError, match="device: 'cuda:2' is not available"):
        training_device("cuda:2")
    assert training_device("mps") == torch.device("mps")


def test_mps_perturbs_on_all_cores_and_keeps_its_base_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    config = make_config(tmp_path / "run", model, replicas=None, threads=None, device="mps")
    found = with_resources(config)
    assert (found.device, found.replicas, found.threads) == ("mps", 1, 3)
    engine: Any = SimpleNamespace(device=torch.device("mps"))
    assert not wants_base_on_host(engine, found.model_copy(update={"base_device": "host"}), [])
    assert "base_device" not in less_base(torch.device("mps"), on_host=False)


@pytest.mark.usefixtures("cuda")
def test_a_gpu_has_one_replica_of_one_thread(tmp_path: Path, model: Path) -> None:
    config = make_config(tmp_path / "run", model, replicas=None)
    found = with_resources(config)
    assert (found.replicas, found.threads) == (1, 1)
    asked = with_resources(config.model_copy(update={"replicas": 2, "threads": 3}))
    assert (asked.replicas, asked.threads) == (2, 3)


@pytest.mark.usefixtures("cuda")
def test_as_many_share_a_gpu_as_its_memory_holds(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.pool.open.total_memory", lambda device: 80 * 10**9)
    config = make_config(tmp_path / "run", model, replicas=None, workers_per_gpu="auto")
    found = with_resources(config)
    assert (found.replicas, found.workers_per_gpu) == (4, 1)
    found = with_resources(config.model_copy(update={"workers": 8}))
    assert (found.replicas, found.workers_per_gpu, found.sharing) == (1, 4, 4)
    assert with_resources(config.model_copy(update={"device": "cpu", "workers": 2})).workers_per_gpu == 1
    assert with_resources(config.model_copy(update={"engine": "vllm"})).replicas == 1
    monkeypatch.setattr("estune.pool.open.total_memory", lambda device: 10**9)
    assert with_resources(config).replicas == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the cluster has GPUs, and this machine has none
    monkeypatch.setattr("estune.pool.ray.cluster.cluster_device", lambda config: "cuda")
    with pytest.raises(EstuneError, match="workers_per_gpu auto goes by .* give a number"):
        with_resources(config.model_copy(update={"workers": 8}))


@pytest.mark.parametrize(
    ("memory", "changes", "on_host"),
    [
        (0, {"device": "cpu"}, False),  # there host and device are one
        (50, {}, False),  # 10 MB of live weights leave 40, of which 20 of base take half
        (49, {}, True),
        (49, {"base_device": "device"}, False),
        (50, {"base_device": "host"}, True),
        (50, {"replicas": 2}, True),  # each replica has a half
        (50, {"workers": 4, "workers_per_gpu": 2}, True),  # and so has each worker
        (30, {"weights": "copy"}, False),
        (29, {"weights": "copy"}, True),
        (29, {"weights": "inplace"}, False),
        (19, {"weights": "exact_inplace"}, False),
    ],
)
@pytest.mark.usefixtures("cuda")
def test_where_the_base_lies(
    memory: int, changes: dict[str, Any], on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(**{"device": "cuda", **changes})
    monkeypatch.setattr("estune.pool.replica.total_memory", lambda device: memory * 10**6)
    weight = torch.zeros(5 * 10**6, dtype=torch.bfloat16)
    engine: Any = SimpleNamespace(
        device=training_device(config.device), model=SimpleNamespace(parameters=lambda: [weight])
    )
    assert wants_base_on_host(engine, config, [Parameter("w", weight)]) is on_host


def test_halves_are_those_of_a_checkpoint_in_bfloat16_and_others_are_refused(tmp_path: Path, model: Path) -> None:
    halves = shutil.copytree(model, tmp_path / "halves")
    AutoModelForCausalLM.from_pretrained(model).bfloat16().save_pretrained(halves)
    found = with_resources(make_config(tmp_path / "run", halves, weights="split_master", device="cpu"))
    assert found.dtype == "bfloat16"
    assert Replica(found).weights.rule.how.name == "split_master"
    whole = with_resources(make_config(tmp_path / "run", model, weights="split_master", device="cpu"))
    with pytest.raises(EstuneError, match="not in float32: set dtype=bfloat16, or weights=exact_inplace"):
        Replica(whole)


def test_a_base_nowhere_cannot_be_on_the_host() -> None:
    with pytest.raises(ValueError, match="weights=inplace keeps no base that base_device=host could hold"):
        Config(weights="inplace", base_device="host")


def test_settings_name_the_device_that_auto_stood_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert with_resources(make_config(tmp_path / "run", model)).device == expected


@pytest.mark.parametrize(
    ("device", "on_host", "advised"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_another_place_for_the_base_is_advised_where_there_is_one(device: str, on_host: bool, advised: bool) -> None:
    remedy = less_base(torch.device(device), on_host=on_host)
    assert ("base_device=host" in remedy) is advised
    assert "weights=copy" in remedy


def test_only_to_generate_needs_no_weights_that_can_be_perturbed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise EstuneError("these cannot be perturbed")

    config = make_config(tmp_path / "run", model)
    expected = Replica(config).generate([[1, 2, 3]], make_sampling(config))
    for name in (
        "estune.pool.replica.Weights",
        "estune.pool.replica.training_device",
        "estune.pool.open.training_device",
    ):
        monkeypatch.setattr(name, refuse)
    with pytest.raises(EstuneError, match="cannot be perturbed"):
        Replica(config)
    pool = open_generators(with_resources_to_generate(config).model_copy(update={"replicas": 2}))
    try:
        assert pool.replicas[0].generate([[1, 2, 3]], make_sampling(config)) == expected
        assert pool.generate([[1, 2, 3]] * 129, make_sampling(config)) == expected * 129
        other: Any = pool.replicas[1]
        other.process.kill()  # another takes its place
        assert pool.generate([[1, 2, 3]] * 129, make_sampling(config)) == expected * 129
    finally:
        pool.close()


def test_members_of_low_rank_are_taken_around_the_base_as_it_is_now(tmp_path: Path) -> None:
    """After an update, after a member that was alone, and after a rebuild: as by a replica that has seen none of it."""
    model = save_model(tmp_path / "model", **FUSABLE, hidden_size=64)
    config = make_config(tmp_path / "run", model, noise="rank1")
    prompts = [[9, 8, 7], [30, 40], [5] * 6]
    sampling = make_sampling(config)
    members = [Member(1), Member(2, -1)]
    update = Update(0, (Member(3),), (0.3,))

    def fresh(updates: list[Update]) -> list[list[list[int]]]:
        replica = Replica(config)
        replica.rebuild(updates)
        return answers(replica)

    def answers(replica: Replica) -> list[list[list[int]]]:
        assert replica.at_once(prompts, sampling) > 1
        replica.take(members, 0.02)
        return [[c.token_ids for c in completions] for completions in replica.complete_each(prompts, sampling)]

    before, after = fresh([]), fresh([update])
    assert before != after
    replica = Replica(config)
    assert answers(replica) == before
    replica.apply(update)
    assert answers(replica) == after
    replica.take(members[:1], 0.5, played=True)  # its weights are the live ones now
    assert answers(replica) == after
    replica.rebuild([])
    assert answers(replica) == before
