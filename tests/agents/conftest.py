"""What rollouts and endpoints are tried with: a tiny model, an engine that follows a script, a function that plays."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from estune.agents.endpoint import Endpoint
from estune.agents.play import Limits, Players
from estune.completion import Completion, Played, Sampling
from estune.engines.continuous import Batcher, Request
from estune.engines.prompts import PromptEncoder
from estune.engines.transformers import TransformersEngine
from estune.grading.rollout import Kind, Opening, Rollout
from tests.models import CHAT_TEMPLATE, build_config, build_tokenizer, save_model

SAMPLING = Sampling(6)
Play = Callable[..., list[Completion]]


def python_with(package: str) -> str:
    """An interpreter that has a package: this one or, of other people's environments, the first that has it.

    They are named in ESTUNE_CLIENTS, and none of their tests is skipped where it is set.
    """
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    others = os.environ.get("ESTUNE_CLIENTS", "").split()
    for python in others:
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        if subprocess.run([python, "-P", "-c", look], check=False).returncode == 0:
            return python
    assert not others, f"{package} is in none of the environments {others}"
    pytest.skip(f"{package} is not installed: make clients")


def played(completion: Completion) -> Played:
    """What became of a rollout."""
    assert completion.played is not None
    return completion.played


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return TransformersEngine(save_model(tmp_path_factory.mktemp("model"), "llama", hidden_size=64, head_dim=32))


@pytest.fixture
def play(engine: TransformersEngine) -> Iterator[Play]:
    """Plays one rollout for each row."""
    made: list[Players] = []

    def play(
        kind: Kind,
        target: Any,
        rows: Sequence[dict[str, Any]],
        limits: Limits = Limits(),  # noqa: B008
        sampling: Sampling = SAMPLING,
        **how: Any,
    ) -> list[Completion]:
        made.append(Players(engine, engine, limits))
        rollout = Rollout(kind, target, **how)
        return made[-1].play([Opening(engine.encode([row["prompt"]])[0], rollout, row) for row in rows], sampling)

    yield play
    for players in made:
        players.close()


TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}!{% endfor %}"
)


@dataclass
class Scripted:
    """An engine that says what it is told to say, or nothing as long as it is held.

    Attributes:
        text: what it says.
        script: what it says first, one request after another.
    """

    tokenizer: PreTrainedTokenizerFast
    text: str = ""
    script: list[str] = field(default_factory=list)
    held: bool = False
    asked: list[Request] = field(default_factory=list)
    joined: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    rows: dict[int, str | None] = field(default_factory=dict)
    most_idle: float | None = None

    @property
    def end_ids(self) -> list[int]:
        return [self.tokenizer.eos_token_id]

    def check(self, prompt_ids: Any, sampling: Sampling) -> None: ...

    def open_rows(self) -> Scripted:
        return self

    def join(self, request: Request) -> int:
        self.asked.append(request)
        self.rows[len(self.asked)] = self.script.pop(0) if self.script else None
        self.joined.set()
        return len(self.asked)

    def step(self) -> list[tuple[int, list[int]]]:
        if self.held:
            time.sleep(0.002)
            return [(row, []) for row in self.rows]
        said = {row: self.text if text is None else text for row, text in self.rows.items()}
        return [(row, [*self.tokenizer(text)["input_ids"], *self.end_ids]) for row, text in said.items()]

    def leave(self, row: int) -> None:
        del self.rows[row]
        self.left.set()

    def shown(self, number: int = -1) -> str:
        return str(self.tokenizer.decode(self.asked[number].prompt_ids))


def mark(engine: Scripted, marks: str) -> None:
    engine.tokenizer.chat_template = TOOL_TEMPLATE + "{#" + marks + "#}"


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, Endpoint]]:
    tokenizer = build_tokenizer()
    encoder = PromptEncoder("scripted", tokenizer, build_config("llama", max_position_embeddings=1 << 16))
    engine = Scripted(tokenizer)
    with Endpoint(encoder, Sampling(1000), model="scripted", requests=4) as endpoint, Batcher(engine) as batcher:
        endpoint.serve(batcher)
        yield engine, endpoint
