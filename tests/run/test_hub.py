"""Runs that go to a hub and come back: one on this machine, over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.journal.verify import verify
from estune.weights.checkpoint import Checkpoint
from tests.hubs import Hub, open_hub
from tests.journal.histories import write_history


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with open_hub() as hub:
        yield hub


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    write_history(tmp_path / "run", model)
    return tmp_path / "run"


@pytest.fixture(scope="module", autouse=True)
def _commands(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new interpreter, as the hub's library reads when it is imported where the hub is."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("hub") / "home"),
        "HF_TOKEN": "hf_token",
        "HF_HUB_DISABLE_XET": "1",
    }
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "tests.commands"]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as hub.commands:
        yield
        assert hub.commands.stdin is not None
        hub.commands.stdin.close()


def estune(hub: Hub, folder: Path, *arguments: object) -> str:
    """Run a command that knows this hub and no other; what it says, or the error that it ends with."""
    assert hub.commands is not None
    assert hub.commands.stdin is not None
    assert hub.commands.stdout is not None
    print(json.dumps([str(folder), *map(str, arguments)]), file=hub.commands.stdin, flush=True)
    code, out, error = json.loads(hub.commands.stdout.readline())
    assert (code == 0) == ("error: " not in error), error
    assert "Traceback" not in error
    return str(out if code == 0 else error)


def test_a_run_comes_back_as_a_model_and_a_run(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert f"{hub.url}/me/whole/commit/" in estune(hub, tmp_path, "push", run, "me/whole", "--private")
    assert hub.private["me/whole"]
    card = ModelCard(hub.models["me/whole"]["README.md"].decode())
    assert 'from_pretrained("me/whole")' in card.text
    assert "verify" in estune(hub, tmp_path, "pull", "me/whole", "-o", "pulled")
    pulled = tmp_path / "pulled"
    AutoModelForCausalLM.from_pretrained(pulled, trust_remote_code=False)
    assert Journal.read(pulled).texts() == Journal.read(run).texts()
    assert verify(pulled).checkpoints == {"pulled": 3}
    assert not list(tmp_path.glob(".pulled*"))


def test_the_journal_alone_is_small_and_enough(hub: Hub, run: Path, tmp_path: Path) -> None:
    estune(hub, tmp_path, "push", run, "me/small", "--journal-only", "--step", 2)
    files = hub.models["me/small"]
    assert "model.safetensors" not in files
    assert sum(map(len, files.values())) < 30_000
    assert "estune replay RUN --step 2 -o MODEL" in files["README.md"].decode()
    estune(hub, tmp_path, "pull", "me/small", "-o", "pulled")
    replay(tmp_path / "pulled", tmp_path / "model")
    expected = Checkpoint(run / "final").content_hash()
    assert Checkpoint(tmp_path / "model").content_hash() == expected


def test_a_step_of_which_no_checkpoint_is_there_is_rebuilt(hub: Hub, run: Path, tmp_path: Path) -> None:
    estune(hub, tmp_path, "push", run, "me/step", "--step", 1)
    estune(hub, tmp_path, "pull", "me/step", "-o", "pulled")
    assert verify(tmp_path / "pulled").checkpoints == {"pulled": 1}


def test_what_goes_wrong_is_one_line(hub: Hub, run: Path, tmp_path: Path) -> None:
    assert "pull me/none: 404" in estune(hub, tmp_path, "pull", "me/none", "-o", "pulled")
    hub.models["me/model"] = {"config.json": b"{}"}
    assert "holds no journal" in estune(hub, tmp_path, "pull", "me/model", "-o", "pulled")
    hub.models["me/bad"] = {"journal.estune": b"estune journal, compact form 1\nxx"}
    assert "is damaged" in estune(hub, tmp_path, "pull", "me/bad", "-o", "pulled")
    assert not (tmp_path / "pulled").exists()
    assert "has 3 steps, not 9" in estune(hub, tmp_path, "push", run, "me/x", "--step", 9)
    assert "exists already" in estune(hub, tmp_path, "pull", "me/model", "-o", run)
    shutil.rmtree(run)
    assert "this is no run" in estune(hub, tmp_path, "push", run, "me/x")
