"""The command that talks to a model. A line is a message; a piped text is one message as a whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from estune.cli.options import ConfigFile, overrides_of
from estune.cli.output import opening
from estune.errors import EstuneError, printable_lines

if TYPE_CHECKING:
    from estune.run.chat import Chat

HELP = "/clear begins anew, /exit or Ctrl-D ends; Ctrl-C ends an answer"
WIDE = 100  # columns from which on two answers stand side by side


def chat(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="a run's directory or .estune file, a checkpoint, hub id, smollm2 or tiny")
    ],
    config: ConfigFile = None,
    system: Annotated[str | None, typer.Option(help="what the conversation begins with")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="show the base model's answers beside a run's")] = False,
) -> None:
    """Talk to a run's best checkpoint, or to any model.

    It answers as the run generated, or as the defaults say; settings such as `--temperature 0.8` and
    `--max-new-tokens 200` change that. A text on standard input is answered once: `echo "Hello" | estune chat smollm2`.
    """
    from estune.config import read

    settings = read(config, overrides_of(context.args))
    with opening(f"chat with {model}", silent=not sys.stdin.isatty()):  # a pipe is given the answer alone
        from estune.run.chat import open_chats

        chats = open_chats(model, settings, system, compare=compare)
    console = Console(highlight=False, markup=False)
    if not sys.stdin.isatty():
        said = sys.stdin.read().removesuffix("\n")
        if not said.strip():
            raise EstuneError("standard input holds no text to answer; give one, or talk in a terminal")
        reply(chats, said, console)
        return
    with suppress(ImportError):  # which some Pythons are built without
        import readline  # noqa: F401  # lets `input` edit lines and remember them
    console.print(HELP, style="dim")
    converse(chats, input, console)


def converse(chats: Mapping[str, Chat], read: Callable[[str], str], console: Console) -> None:
    """Answer message after message.

    Args:
        chats: who answers, by what they are called.
        read: gives the next message, after a prompt, or raises what `input` raises.
        console: where the answers go.
    """
    while True:
        try:
            said = read("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:  # of a message that is not to be sent
            console.print()
            continue
        if said.strip() == "/exit":
            return
        if said.strip() == "/clear":
            for each in chats.values():
                each.clear()
        elif said.startswith("/"):
            console.print(HELP, style="dim")
        elif said.strip():
            try:
                reply(chats, said, console)
            except KeyboardInterrupt:
                console.print()
            except EstuneError as error:
                console.print(printable_lines(str(error)), style="red", soft_wrap=True)


def reply(chats: Mapping[str, Chat], said: str, console: Console) -> None:
    """Show everybody's answer as it comes: side by side where there is room, else one after the other."""
    if len(chats) > 1 and console.is_terminal and console.width >= WIDE:
        with _columns(chats, console) as answers:
            for name, each in chats.items():
                each.answer(said, answers[name])
        return
    for name, each in chats.items():
        if len(chats) > 1:
            console.print(f"{name}:", style="bold")
        completion = each.answer(said, _Stream(console))
        console.print()
        if not completion.finished:
            tokens = len(completion.token_ids)
            Console(stderr=True).print(f"cut off after {tokens} tokens: see --max-new-tokens", style="dim")


class _Stream:
    """Prints what a growing text has gained since it was last told."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = 0

    def __call__(self, text: str) -> None:
        self._console.print(printable_lines(text[self._shown :]), end="", soft_wrap=True)
        self._shown = max(self._shown, len(text))


@contextmanager
def _columns(names: Mapping[str, Chat], console: Console) -> Iterator[dict[str, Callable[[str], None]]]:
    """For each name, a function to tell its text so far. What fits on the screen is shown, and all of it at the end."""
    texts = dict.fromkeys(names, "")

    def table() -> Table:
        found = Table(*names, expand=True)
        for column in found.columns:
            column.ratio = 1
        found.add_row(*(Text(printable_lines(text)) for text in texts.values()))
        return found

    def teller(name: str) -> Callable[[str], None]:
        return lambda text: texts.update({name: text})

    try:
        with Live(console=console, get_renderable=table, transient=True, vertical_overflow="ellipsis"):
            yield {name: teller(name) for name in names}
    finally:
        console.print(table())
