"""How much memory there is; running out of it: what ran out, and what to do about it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma4TextConfig, JambaConfig, Qwen3NextConfig

from estune.completion import Sampling
from estune.engines import memory
from estune.engines.cache import RowCache
from estune.engines.memory import (
    MOST_ENGINES,
    attends_everywhere,
    cached_elements,
    fitting_engines,
    known_cache,
    memory_for,
)
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from tests.models import build_config, save_model

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.21 GiB is "
    "free. Including non-PyTorch memory, this process has 22.4 GiB memory in use."
)


@pytest.mark.parametrize(
    ("config", "parallel", "elements"),
    [
        (build_config("qwen2"), 1, 3 * 2 * 2 * 16),  # layers x (key, value) x heads x width
        (build_config("qwen2"), 2, 3 * 2 * 1 * 16),
        (build_config("gpt2"), 1, 3 * 2 * 48),
        (build_config("mamba"), 1, 3 * 2 * 48),  # a state, counted as heads of the hidden size
        (build_config("rwkv"), 1, 3 * 2 * 48),
        # Full attention, the last of them, has half the heads at twice the width.
        (
            Gemma4TextConfig(
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                global_head_dim=32,
                num_kv_shared_layers=0,
            ),
            1,
            2 * 2 * 2 * 16 + 2 * 2 * 32,
        ),
    ],
    ids=["grouped", "split", "multi-head", "mamba", "rwkv", "layers that differ"],
)
def test_what_a_token_leaves_in_the_cache(config: Any, parallel: int, elements: int) -> None:
    assert cached_elements(config, parallel) == elements


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (build_config("qwen2"), True),
        (build_config("gpt2"), True),
        (build_config("gemma2"), True),  # some of whose layers look at a window alone
        (build_config("mamba"), False),
        (build_config("rwkv"), False),
        (JambaConfig(num_hidden_layers=4), False),  # attends in some layers, which its config lists under no type
        (Qwen3NextConfig(num_hidden_layers=4), False),
    ],
    ids=["grouped", "multi-head", "windows", "mamba", "rwkv", "mamba and attention", "linear attention"],
)
def test_whether_every_layer_keeps_keys_and_values(config: Any, expected: bool) -> None:
    assert attends_everywhere(config) is expected


@pytest.mark.parametrize(
    ("needed", "weights", "allotted", "expected"),
    [
        (20, 16, 48, 20),  # of 48 GiB a quarter is spared, more than 4
        (20, 17, 48, None),
        (3, 1, 8, 3),  # of 8 GiB 4 are
        (4, 1, 8, None),
        (1, 0, 4, None),
    ],
)
def test_a_cache_is_known_where_all_of_it_fits(needed: int, weights: int, allotted: int, expected: int | None) -> None:
    found = known_cache(needed << 30, weights << 30, allotted << 30)
    assert found == (None if expected is None else expected << 30)


def test_engines_that_one_device_holds() -> None:
    # 80 GB, a step of 200 prompts of 19 MB. Half a billion parameters, 1 GB and 2 of a base, fit four times; of more
    # than four nobody gains.
    small = {"live": 10**9, "base": 2 * 10**9, "rows": 200, "row": 19 * 10**6, "share": 4}
    assert fitting_engines(80 * 10**9, **small) == MOST_ENGINES == 4
    # Of 40 GB a third leaves 12.3 beside the live weights, of which a quarter is less than the 3.8 GB of a batch; a
    # half leaves 19.
    assert fitting_engines(40 * 10**9, **small) == 2
    assert fitting_engines(40 * 10**9, **{**small, "rows": 100}) == 4
    assert fitting_engines(16 * 10**9, **small) == 1
    # Seven billion: 15 GB and 30 of a base, which may take half of what is left of 75 GB, and not of 40.
    large = {"live": 15 * 10**9, "base": 30 * 10**9, "rows": 20, "row": 10**8, "share": 4}
    assert fitting_engines(80 * 10**9, **large) == 1
    assert fitting_engines(150 * 10**9, **large) == 2
    # On the host it takes nothing: a third of 80 GB leaves 11.7, of which a quarter holds the 2 GB of a batch.
    assert fitting_engines(80 * 10**9, **{**large, "base": 0}) == 3


def test_torch_on_the_cpu() -> None:
    asked = r"^out of memory for the cache: asked for 1048576.00 GiB more, the device has [\d.]+ GiB in all; buy more$"
    with pytest.raises(EstuneError, match=asked), memory_for("the cache", "buy more"):
        torch.empty(1 << 50, dtype=torch.uint8)


def test_numpy() -> None:
    with pytest.raises(EstuneError, match=r"the base: asked for 1.00 PiB more"), memory_for("the base", "buy more"):
        np.empty(1 << 50, np.uint8)


def test_cuda() -> None:
    expected = r"for the cache: asked for 20.00 GiB more, the device has 23.64 GiB in all; buy more"
    with pytest.raises(EstuneError, match=expected), memory_for("the cache", "buy more"):
        raise torch.OutOfMemoryError(CUDA)


def test_cuda_without_a_total_says_nothing_of_the_machines_memory() -> None:
    expected = "^out of memory for the cache: asked for what it needs; buy more$"
    with pytest.raises(EstuneError, match=expected), memory_for("the cache", "buy more"):
        raise RuntimeError("CUDA error: out of memory")


def test_python_and_whoever_tells_no_size() -> None:
    for error in (
        MemoryError(),
        RuntimeError("not enough memory: x"),
        OSError(errno.ENOMEM, "in another language"),
        OSError(errno.ENOSPC, "in another language"),
    ):
        with (
            pytest.raises(EstuneError, match="for the cache: asked for what it needs, "),
            memory_for("the cache", "buy more"),
        ):
            raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), FileNotFoundError("memory"), EstuneError("out of memory")]
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as found, memory_for("the cache", "buy more"):
        raise error
    assert found.value is error


@pytest.fixture
def engine(model: Path) -> TransformersEngine:
    return TransformersEngine(model, device="cpu")


def test_a_cache_too_large_is_named() -> None:
    cache = RowCache(1)
    cache.open(1 << 20, 1 << 20)
    states = torch.zeros(1, 2, 1, 16)
    with pytest.raises(EstuneError, match=r"out of memory for the key/value cache: .*; lower batch_size or max_new"):
        cache.update(states, states, 0)


def test_a_batch_too_large_is_named(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return torch.empty(1 << 50)

    monkeypatch.setattr(engine.decoder, "run", forward)
    with pytest.raises(EstuneError, match=r"out of memory for the activations of a batch: .*; lower batch_size"):
        engine.generate([[1, 2, 3]], Sampling(4))


SCRIPT = """
import resource, sys, torch
from pathlib import Path
from estune.engines.loading import load_model
torch.set_num_threads(1)
load_model(Path(sys.argv[1]), "float32", torch.device("cpu"))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
load_model(Path(sys.argv[1]), "float32", torch.device("cpu"))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="limits the address space as Linux does")
def test_loading_says_that_weights_do_not_fit(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", vocab_size=200_000)  # twice 51 MB of embeddings
    command = [sys.executable, "-u", "-c", SCRIPT, str(tmp_path)]  # a warm one
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "EstuneError: out of memory for the live weights: asked for " in last
    assert "take a smaller model" in last


def test_memory_is_the_machines_not_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}  # asked for anything else, this fails
    monkeypatch.setattr(os, "sysconf", answers.__getitem__)
    monkeypatch.setattr(memory, "group_limits", list)
    assert memory.total_memory(torch.device("cpu")) == 4096000
    monkeypatch.setattr(memory, "group_limits", lambda: [5000000, 3000000])
    assert memory.total_memory(torch.device("cpu")) == 3000000


@pytest.mark.parametrize(
    ("groups", "limits", "found"),
    [
        ("0::/", {"memory.max": "max"}, []),
        ("0::/", {"memory.max": "500"}, [500]),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "700", "memory.current": "3"}, [700]),
        ("5:cpu:/x\n4:memory:/x", {"memory/x/memory.limit_in_bytes": "900", "cpu/x/memory.limit_in_bytes": "1"}, [900]),
        ("4:memory:/outside", {"memory/memory.limit_in_bytes": "800"}, [800]),
        (None, {}, []),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, groups: str | None, limits: dict[str, str], found: list[int]) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    for name, text in (files | ({"proc/self/cgroup": groups} if groups else {})).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert memory.group_limits(tmp_path) == found
