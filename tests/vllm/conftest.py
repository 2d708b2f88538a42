"""Engines over tiny models, each started once for all tests. Skipped where vLLM is not installed."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.compiled import compiled

os.environ.setdefault("NUMBA_CACHE_DIR", compiled())
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"RAY_worker_niceness": "0"}  # at Ray's own, 15, workers would wait for all other tests

import pytest

from estune.config import Config
from estune.engines.vllm.internals import prepare
from estune.weights.checkpoint import Checkpoint
from tests.models import save_model
from tests.warm import POSSIBLE, start

# What engines and their processes load first, and what looks at each architecture in a process of its own.
WARM = (
    *("tests.vllm.packed", "vllm.entrypoints.llm", "vllm.v1.core.sched.scheduler"),
    *("vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker"),
    *("vllm.model_executor.models.registry", "vllm.model_executor.models.qwen3"),
    *("vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve"),
)

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
elif POSSIBLE:
    import numba  # noqa: F401  # as vLLM will, for `prepare` to see it

    prepare()
    # PyTorch would compile two of vLLM's functions, which count and compare whole numbers: longer than most tests take.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

    def pytest_configure() -> None:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

        SpinCondition.__init__.__defaults__ = (0.02,)  # seconds that a process computes while it waits: a whole one
        gc.unfreeze = lambda: None  # an engine that ends would go through all that has been imported, twice
        start(*WARM)


# Heads as wide as vLLM's kernels for CPUs take; a vocabulary that is not a multiple of 64 and so is padded.
SHAPE: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of a tiny model of an architecture, with changes to its shape."""
    made: dict[str, Path] = {}

    def save(kind: str, **changes: Any) -> Path:
        key = f"{kind}{sorted(changes.items())}"
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("models") / kind, kind, **{**SHAPE, **changes})
        return made[key]

    return save


@pytest.fixture(scope="session")
def started() -> Iterator[dict[tuple[Path, str, int], Any]]:
    """Engines that run, by model, type and processes."""
    found: dict[tuple[Path, str, int], Any] = {}
    yield found
    close(found)


def close(started: dict[tuple[Path, str, int], Any]) -> None:
    for engine in started.values():
        engine.close()
    started.clear()


@pytest.fixture(scope="session")
def engines(started: dict[tuple[Path, str, int], Any]) -> Callable[..., Any]:
    """The engine over a model, started at the first call for it."""
    from estune.engines.vllm.engine import VllmEngine

    def engine(path: Path, dtype: str = "float32", parallel: int = 1) -> VllmEngine:
        key = (path, dtype, parallel)
        if key not in started:
            settings = Config(model=str(path), engine="vllm", dtype=dtype, gpus_per_worker=parallel, batch_size=32)
            started[key] = VllmEngine(Checkpoint(path), settings)
        return started[key]

    return engine


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Adapters are made in a cache of this module's."""
    from vllm import envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", envs.VLLM_CACHE_ROOT)  # which has what it found out about models, in seconds
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def alone_here(started: dict[tuple[Path, str, int], Any]) -> None:
    """None of these engines runs: what all of a process share ends with any of them, as where a run does."""
    close(started)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that have engines of their own come last."""
    items.sort(key=lambda item: "alone_here" in getattr(item, "fixturenames", ()))
