"""One thread, no hub: what every test relies on."""

from __future__ import annotations

import atexit
import fcntl
import os
import posix
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.compiled import compiled

os.environ.setdefault("NUMBA_CACHE_DIR", compiled())
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="estune-tests-")  # what tests run is not what the user has run
os.environ |= {"RAY_worker_niceness": "0"}  # at Ray's own, 15, workers would wait for all other tests
if shutil.which("nvidia-smi") is None:  # Triton reads it when it is imported, which may be at any test
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.models import FUSABLE, save_model
from tests.rays import shared_cluster, undisturbed_run  # noqa: F401
from tests.sandboxes import nothing_left_behind  # noqa: F401
from tests.warm import POSSIBLE, execute_cold, start

# On a busy machine any example may take a second.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
os.fsync = os.fstat  # type: ignore[assignment]  # nobody waits for disks: what a kernel has outlives a kill
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)


def pytest_configure() -> None:
    start()
    torch.set_num_threads(1)  # two threads on busy cores are many times slower than one


SLOWEST = (
    "tests/pool/test_ray_faults.py",
    "tests/grading/test_pool.py",
    "tests/grading/test_sandbox.py",
    "tests/test_examples.py",
    "tests/engines/test_fused.py",
    "tests/noise/test_noise_gpu.py",
    "tests/run/test_trainer.py",
    "tests/pool/test_remote_rollouts.py",
    "tests/pool/test_ray_pool.py",  # not beside the other file of Ray's
    "tests/run/test_graders.py",
    "tests/weights/test_weights_gpu.py",
    "tests/run/test_search.py",
    "tests/run/test_guard.py",
    "tests/test_site.py",
    "tests/cli/test_commands.py",
    "tests/engines/test_graph.py",
    "tests/rewards/test_judge.py",
    "tests/pool/test_remote.py",
    "tests/cli/test_processes.py",
    "tests/study/test_shapes.py",
    "tests/weights/test_smollm2.py",
    "tests/run/test_durability.py",
    "tests/study/test_estimate.py",
    "tests/engines/test_decode.py",
    "tests/journal/test_replay.py",
    "tests/noise/test_gpu_inplace.py",
    "tests/rewards/test_payloads.py",
    "tests/noise/test_cpu_inplace.py",
    "tests/run/test_adapter.py",
    "tests/cli/test_studies.py",
    "tests/run/test_trust.py",
    "tests/noise/test_cpu_integers.py",
    "tests/weights/test_merged.py",
    "tests/noise/test_gpu_low_rank.py",
    "tests/weights/test_weights_pieces.py",
    "tests/trl/test_trainer.py",
    "tests/grading/test_level.py",
    "tests/journal/test_faults.py",
    "tests/run/test_integers.py",
    "tests/study/test_report.py",
    "tests/engines/test_continuous.py",
    "tests/engines/test_kernels.py",
    "tests/run/test_staleness.py",
    "tests/run/test_quantized.py",
    "tests/noise/test_noise.py",
    "tests/run/test_curriculum.py",
    "tests/study/test_report_browser.py",
    "tests/engines/test_transformers.py",
    "tests/agents/test_training.py",
    "tests/run/test_monitors.py",
    "tests/run/test_trackers.py",
    "tests/study/test_sweep.py",
    "tests/engines/test_vision.py",
    "tests/engines/test_together.py",
    "tests/agents/test_endpoint.py",
    "tests/cli/test_dry_run.py",
    "tests/study/test_compare.py",
    "tests/agents/test_served.py",
    "tests/rewards/test_math.py",
    "tests/test_gpu_day.py",
    "tests/test_config.py",
    "tests/run/test_resume.py",
    "tests/journal/test_ancestors.py",
    "tests/test_bench_page.py",
    "tests/journal/test_compact.py",
    "tests/agents/test_clients.py",
    "tests/test_house.py",
    "tests/run/test_load.py",
    "tests/journal/test_verify.py",
    "tests/grading/test_sandbox_attacks.py",
    "tests/cli/test_eval.py",
    "tests/cli/test_journals.py",
    "tests/study/test_probe.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first: of the processes that share the files, none is left with one of them at the end."""
    order = {file: place for place, file in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.nodeid.split("::")[0], len(SLOWEST)))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def new_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children start as everybody's do."""
    if POSSIBLE:
        monkeypatch.setattr(subprocess.Popen, "_execute_child", execute_cold)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user's cache is in, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def synced_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced is on the disk, whose power may be cut."""
    monkeypatch.setattr(os, "fsync", posix.fsync)


@pytest.fixture
def sandboxes_alone() -> Iterator[None]:
    """Nobody else who asks for this runs at the same time: sandboxes are counted, and tests run side by side."""
    with (Path(tempfile.gettempdir()) / "estune-tests-sandbox.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model on disk, for runs: of those that the fused decoder takes, in a third of the time."""
    return save_model(tmp_path_factory.mktemp("models") / "base", seed=1, **FUSABLE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium, which the system has or playwright brings (`playwright install chromium`)."""
    playwright = pytest.importorskip("playwright.sync_api")
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        try:
            opened = p.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()
