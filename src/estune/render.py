"""Chat templates, rendered in a process of their own, which can be ended: they are programs that come with a model.

transformers' sandbox keeps a template from everything but computing: it can still loop for ever, or fill the memory.
Here that ends the process, not the run. Requests and answers are JSON, one a line.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from estune.children import watch_parent
from estune.completion import Rendering, content_text
from estune.errors import EstuneError

START_SECONDS = 120.0
SECONDS = 10.0  # for one conversation; templates in use take a thousandth of a second
MOST_CHARACTERS = 10_000_000
MEMORY = 2 << 30  # bytes, beyond what the process has when it is ready


class Refused(Exception):
    """A template refused a conversation. The message is the template's, or says what became of the process."""


class Renderer:
    """Renders conversations, one at a time, in a process that starts when it is first needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        tokenizer: Any,
        conversation: list[Any],
        rendering: Rendering = Rendering(),  # noqa: B008
        *,
        begin: bool = False,
        proceed: bool = False,
        parts: bool = False,
    ) -> str:
        """A conversation as its tokenizer's chat template shows it.

        Args:
            tokenizer: gives the template, and the special tokens that it may use.
            conversation: messages, in JSON's types.
            rendering: the date that the template is told, and its options.
            begin: begin a message of the assistant at the end.
            proceed: leave the last message open, to be continued.
            parts: show the template all contents as lists of parts, with pictures as `{"type": "image"}`, which is
                what templates of vision-language models know. Otherwise they are the text of their parts.

        Raises:
            Refused: the template raised, did not end in time or took too much memory.
            EstuneError: the process cannot be started.
        """
        request = {
            # As `apply_chat_template` does: a key without a value is no key. A list of parts is the text of them.
            "conversation": [
                {k: (_in_parts if parts else _plain)(k, v) for k, v in message.items() if v is not None}
                for message in conversation
            ],
            "template": tokenizer.get_chat_template(),
            "variables": {**tokenizer.special_tokens_map, **rendering.options},
            "date": (rendering.date or date.today()).isoformat(),
            "begin": begin,
            "proceed": proceed,
        }
        line = json.dumps(request, default=str).encode() + b"\n"
        with self._lock:
            answer = json.loads(self._ask(line))
        if "error" in answer:
            raise Refused(answer["error"])
        text: str = answer["text"]
        return text

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _ask(self, line: bytes) -> bytes:
        if self.process is None or self.process.poll() is not None:
            self._start()
        return self._answer(line, SECONDS, f"does not end within {SECONDS:g} s")

    def _start(self) -> None:
        self.close()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "estune.render"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the trainer alone
        )
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        try:
            self._answer(b"", START_SECONDS, "is not reached")
        except Refused as error:
            raise EstuneError(f"the process that renders chat templates cannot be started: it {error}") from error

    def _answer(self, request: bytes, seconds: float, late: str) -> bytes:
        """Send a request and wait for its answer, with one deadline: a process that is stopped reads nothing either."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        answer = bytearray()
        try:
            while not answer.endswith(b"\n"):
                left = max(0.0, deadline - time.monotonic())
                reads, writes, _ = select.select([process.stdout], [process.stdin] if request else [], [], left)
                if not reads and not writes:
                    raise Refused(late)
                if writes:
                    request = request[os.write(process.stdin.fileno(), request) :]
                if reads:
                    piece = os.read(process.stdout.fileno(), 1 << 20)
                    if not piece:
                        raise BrokenPipeError
                    answer += piece
        except BrokenPipeError:
            self.close()
            raise Refused("takes too much memory or crashes") from None
        except Refused:
            self.close()
            raise
        return bytes(answer)


RENDERER = Renderer()
"""The renderer of this process. Its process serves all models, and ends with this one."""
atexit.register(RENDERER.close)


def _plain(key: str, value: Any) -> Any:
    is_parts = key == "content" and isinstance(value, list | tuple) and all(isinstance(p, str | dict) for p in value)
    return content_text(value) if is_parts else value


def _in_parts(key: str, value: Any) -> Any:
    if key != "content" or not isinstance(value, str | list | tuple):
        return value
    listed = [value] if isinstance(value, str) else value
    known = [{"type": "text", "text": part} if isinstance(part, str) else part for part in listed]
    return [{"type": "image"} if isinstance(part, dict) and part.get("type") == "image" else part for part in known]


def stop_clock(day: date) -> None:
    """Let `strftime_now` of all chat templates of this process give the beginning of a day.

    transformers gives templates its own function alone, which asks the clock.
    """
    from transformers.utils import chat_template_utils

    then = datetime(day.year, day.month, day.day)
    chat_template_utils.datetime = SimpleNamespace(now=lambda: then)


def main() -> None:
    """Answer requests until standard input ends."""
    watch_parent()
    from transformers.utils.chat_template_utils import render_jinja_template

    requests = sys.stdin.buffer
    answers = sys.stdout.buffer
    if sys.platform == "linux":  # elsewhere the kernel does not enforce it
        data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
    answers.write(b"{}\n")
    answers.flush()
    for line in requests:
        request = json.loads(line)
        stop_clock(date.fromisoformat(request["date"]))
        try:
            (text,), _ = render_jinja_template(
                conversations=[request["conversation"]],
                chat_template=request["template"],
                add_generation_prompt=request["begin"],
                continue_final_message=request["proceed"],
                **request["variables"],
            )
            long = len(text) > MOST_CHARACTERS
            answer = {"error": f"makes {len(text):,} characters of it"} if long else {"text": str(text)}
        except Exception as error:  # whatever the template raises
            answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # nobody waits for an answer any more
        os._exit(0)  # without a last attempt to write it
