"""One base for several replicas: shares that are even and cover it, and the bits of a base that is nobody else's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint
from estune.noise.rows import Run
from estune.pool.local import open_local_pool
from estune.pool.replica import Replica
from estune.run.trainer import Trainer
from estune.weights.base import Share, open_memory, share_of
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import Parameter, trained_parameters
from estune.weights.weights import Weights
from tests.models import FUSABLE, build_model
from tests.runs import assert_same_run, make_config, make_task

UPDATE = Update(0, (Member(3), Member(4, -1)), (0.25, -0.5), decay=-0.125, rounding_seed=7)


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = open_memory()
    yield descriptor
    os.close(descriptor)


def parameters(dtype: torch.dtype, seed: int = 1) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (33, 17), "a.bias": (33,), "b.weight": (70, 64)}
    return [Parameter(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_even_and_cover_everything_once(count: int) -> None:
    arrays = [np.zeros(size, np.float32) for size in (561, 1, 4480, 2, 33)]
    for share in (Share(-1, i, count) for i in range(count)):
        found = share_of([Run(a, a, key, key) for key, a in enumerate(arrays)], share)
        assert sum(len(run.base) for run in found) in {5077 // count, 5077 // count + 1}
        for run in found:
            run.base[:] += 1
            assert np.shares_memory(run.base[:1], arrays[run.key][run.start : run.start + 1])
    assert all((a == 1).all() for a in arrays)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["master", "copy"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_shared_base_has_the_bits_of_one_alone(policy: Any, dtype: torch.dtype, count: int, memory: int) -> None:
    options: dict[str, Any] = {"policy": policy, "rounding": "stochastic"}
    alone = Weights(parameters(dtype), **options)
    replicas = [
        # What the others have loaded does not matter, nor who maps the memory first: the first one fills it.
        Weights(parameters(dtype, seed=1 + i), share=Share(memory, i, count), threads=count - 1, **options)
        for i in reversed(range(count))
    ]
    assert {r.fingerprint() for r in replicas} == {alone.fingerprint()}
    alone.apply(UPDATE)
    for replica in replicas:
        assert replica.fingerprint() != alone.fingerprint()
        replica.apply(UPDATE)
    assert {r.fingerprint() for r in replicas} == {alone.fingerprint()}
    assert as_fingerprint(sum(r.share_sum() for r in replicas)) == alone.fingerprint()
    alone.perturb(Member(5), 0.1)
    for replica in replicas:
        replica.perturb(Member(5), 0.1)
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(alone.parameters, replica.parameters, strict=True))


def test_a_saved_checkpoint_is_loaded_by_the_first_alone(model: Path, memory: int) -> None:
    checkpoint = Checkpoint(model)
    models = [build_model("qwen2", seed=9, **FUSABLE) for _ in range(2)]
    first, second = (
        Weights(trained_parameters(built, checkpoint.tensors), share=Share(memory, i, 2))
        for i, built in enumerate(models)
    )
    before = first.fingerprint()
    second.load(checkpoint)
    assert second.fingerprint() == before
    first.load(checkpoint)
    assert first.fingerprint() == second.fingerprint() != before
    for name, array in second.base.items():
        np.testing.assert_array_equal(array, checkpoint.tensors[name].read())


def test_memory_outlives_its_descriptor_and_is_the_same_in_another_process() -> None:
    memory = open_memory()
    here = Share(memory, 0, 2).map(5000)
    program = f"from estune.weights.base import Share; Share({memory}, 1, 2).map(5000)[4999] = 42"
    there = subprocess.Popen([sys.executable, "-u", "-c", program], pass_fds=[memory])  # a warm one
    os.close(memory)
    assert there.wait() == 0
    assert here[4999] == 42


def test_without_anonymous_memory_a_file_does_that_has_no_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(make_config(tmp_path / "memory", model, replicas=2), task=make_task(), monitors=[]).train()
    monkeypatch.delattr(os, "memfd_create", raising=False)
    scratch = tmp_path / "s"  # the path of a socket below it must be short
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    trainer = Trainer(make_config(tmp_path / "file", model, replicas=2), task=make_task(), monitors=[])
    assert all(path.name.startswith("estune-") and path.is_dir() for path in scratch.iterdir())  # the worker's socket
    trainer.train()
    assert not list(scratch.iterdir())
    assert_same_run(tmp_path / "memory", tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="memory is reserved where the system can")
def test_a_base_that_does_not_fit_is_reported_by_who_fills_it(
    model: Path, tmp_path: Path, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        assert (descriptor, offset, length) == (memory, 0, os.fstat(memory).st_size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    config = make_config(tmp_path / "run", model)
    with pytest.raises(EstuneError, match="out of memory for the base .* set weights=copy or"):
        Replica(config, Share(memory, 0, 2))
    Replica(config, Share(memory, 1, 2))


@pytest.mark.skipif(not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir(), reason="reads Linux's /proc")
def test_a_worker_keeps_no_descriptor_but_the_mappings(model: Path, tmp_path: Path) -> None:
    pool = open_local_pool(make_config(tmp_path / "run", model, threads=1, replicas=2))
    try:
        held = Path(f"/proc/{pool.replicas[1].process.pid}/fd").iterdir()  # type: ignore[attr-defined]
        assert sum("estune-base" in os.readlink(file) for file in held) == 1
    finally:
        pool.close()
