"""Chat templates: what transformers makes of them, and an end to those that have none."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

from estune.completion import Rendering
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.render import RENDERER, Refused, Renderer
from tests.models import build_config, build_tokenizer

MESSAGES = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "2+2? 😀 é"}]
LOOP = "{% for i in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4


def encoder(template: str | None = None) -> PromptEncoder:
    tokenizer = build_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return PromptEncoder("m", tokenizer, build_config("qwen2"))


@pytest.mark.parametrize(
    "conversation",
    [
        MESSAGES,
        [*MESSAGES, {"role": "assistant", "content": "It is"}],
        pytest.param(
            [{**MESSAGES[1], "tool_calls": None}],
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.23"), reason="it shows what has no value as null"
            ),
        ),
    ],
    ids=["begun", "gone on with", "without value"],
)
def test_it_is_what_transformers_renders(conversation: list[Any]) -> None:
    open_end = conversation[-1]["role"] == "assistant"
    template = "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ m.content }}{{ eos_token }}{% endfor %}"
    for each in (encoder(), encoder(template + "{% if add_generation_prompt %}A:{% endif %}")):
        each.tokenizer.bos_token = "<|bos|>"
        expected = each.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=not open_end, continue_final_message=open_end
        )
        assert RENDERER.render(each.tokenizer, conversation, begin=not open_end, proceed=open_end) == expected


def test_a_list_of_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?", "image": None}]
    for content in (parts, ["2+", "2?"]):
        assert encoder().encode([[{"role": "user", "content": content}]]) == encoder().encode(
            [[{"role": "user", "content": "2+2?"}]]
        )
    with pytest.raises(
        EstuneError, match="prompt 0: a message has a part of type 'image_url', and 'm' is given text alone"
    ):
        encoder().encode([[{"role": "user", "content": [*parts, {"type": "image_url", "image_url": "x"}]}]])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP, "does not end within 1 s"),
        ("{{ 3 ** (10 ** 9) }}", "does not end within 1 s"),
        ("{% set x = 'a' * 10 ** 11 %}", "MemoryError"),
        ("{{ 'a' * 10000001 }}", "makes 10,000,001 characters"),
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_hostile_template_is_one_line(template: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "1 s" in said:
        monkeypatch.setattr("estune.render.SECONDS", 1.0)
    with pytest.raises(EstuneError, match=rf"prompt 0: the chat template of 'm' refuses it \(.*({said})") as caught:
        encoder(template).encode([MESSAGES])
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert encoder().encode([MESSAGES])  # the next one is rendered


def test_a_process_that_is_killed_is_replaced() -> None:
    renderer = Renderer()
    try:
        first = renderer.render(build_tokenizer(), MESSAGES)
        assert renderer.process is not None
        os.kill(renderer.process.pid, signal.SIGKILL)
        renderer.process.wait()
        assert renderer.render(build_tokenizer(), MESSAGES) == first
    finally:
        renderer.close()


@pytest.mark.parametrize("length", [1, 200_000])  # one fits into the pipe, the other waits for a reader
def test_a_process_that_is_stopped_is_not_waited_for(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer()
    try:
        renderer.render(build_tokenizer(), MESSAGES)
        assert renderer.process is not None
        os.kill(renderer.process.pid, signal.SIGSTOP)
        monkeypatch.setattr("estune.render.SECONDS", 0.3)
        with pytest.raises(Refused, match=r"does not end within 0\.3 s"):
            renderer.render(build_tokenizer(), [{"role": "user", "content": "x" * length}])
    finally:
        renderer.close()


def test_what_json_does_not_know_is_shown_as_text() -> None:
    message = {"role": "user", "content": "x", "when": Path("a/b")}
    template = "{{ messages[0].when }}"
    assert RENDERER.render(encoder(template).tokenizer, [message]) == "a/b"
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(EstuneError, match="prompt 0: the chat template of 'm' refuses it"):
        encoder(template).encode([[{"role": "user", "content": nested}]])


def test_a_template_is_told_the_date_of_the_run_and_its_options() -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% if enable_thinking is false %} no thinking{% endif %}{{ bos_token }}"
    tokenizer = encoder(template).tokenizer
    rendering = Rendering(date(2024, 7, 26), {"enable_thinking": False, "bos_token": "<>"})
    assert RENDERER.render(tokenizer, MESSAGES, rendering) == "26 Jul 2024 no thinking<>"
    before = date.today()
    now = RENDERER.render(tokenizer, MESSAGES)
    assert now in {f"{day:%d %b %Y}" for day in (before, date.today())}
    told = PromptEncoder("m", tokenizer, build_config("qwen2"), rendering=rendering)
    assert tokenizer.decode(told.encode([MESSAGES])[0]) == "26 Jul 2024 no thinking<>"


def test_a_thread_that_ends_leaves_the_process_to_the_next() -> None:
    """The kernel can end a child with the thread that has started it."""
    renderer = Renderer()
    found = []
    try:
        for _ in range(2):
            thread = threading.Thread(target=lambda: found.append(renderer.render(encoder("hi").tokenizer, MESSAGES)))
            thread.start()
            thread.join()
            time.sleep(0.1)
        assert found == ["hi", "hi"]
    finally:
        renderer.close()
