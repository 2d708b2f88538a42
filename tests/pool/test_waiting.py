"""What is told while something takes long."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils.logging import tqdm

from estune.pool.waiting import Wait, told_while, told_while_loading, waited_for
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate

ASKS = """
import faulthandler, logging
faulthandler.dump_traceback_later(60, exit=True)
logging.basicConfig(format="%(message)s")
from estune.pool.waiting import check_model
check_model("nobody/nothing")
"""


def waiting() -> Wait:
    """What is waited for now."""
    found = waited_for()
    assert found is not None
    return found


def test_a_long_wait_is_told_again_and_again_until_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    enough = threading.Event()
    told: list[str] = []

    def take(record: logging.LogRecord) -> bool:
        told.append(record.getMessage())
        if len(told) == 3:
            enough.set()
        return True

    caplog.handler.addFilter(take)
    with told_while("loading M with vllm", first=0.01, then=0.01):
        assert enough.wait(60)
    assert all(word.startswith("still loading M with vllm, for ") for word in told)


def test_what_is_soon_over_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), told_while("loading M"):
        _ = 1 // 0
    assert not caplog.messages


def test_a_model_is_loaded_tensor_by_tensor_and_what_comes_after_has_no_share() -> None:
    model = locate("tiny")
    with told_while_loading("loading M"):
        assert (waiting().so_far(), waiting().share()) == ("", None)
        AutoModelForCausalLM.from_pretrained(model)
        count = len(Checkpoint(model).tensors)
        assert (waiting().so_far(), waiting().share()) == (f": {count:,} of {count:,} tensors", None)
        shares = [waiting().share() for _ in tqdm(range(4), desc="Loading weights")]
        assert shares == [0.0, 0.25, 0.5, 0.75]
        told = waiting().so_far()
        assert [*tqdm(range(3), desc="other", disable=True)] == [0, 1, 2]
        assert waiting().so_far() == told == ": 4 of 4 tensors"
    assert not waited_for()
    assert [*tqdm(range(2), desc="Loading weights", disable=True)] == [0, 1]


def test_a_hub_that_takes_connections_and_never_answers_is_told_of() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", ASKS]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | hub) as process:
            assert process.stderr is not None
            told = process.stderr.readline()
            process.kill()
    assert told.startswith("still asking the hub for nobody/nothing, for ")
