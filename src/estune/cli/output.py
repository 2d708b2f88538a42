"""What commands print: text as it is, and tables."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import get_console
from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from estune import __version__
from estune.errors import printable, printable_lines

BAR = 16  # characters of a bar: the line is to fit on 80
BESIDE = BAR + 20  # of what stands beside the words: what turns, the bar, and the time that is left


def say(text: str) -> None:
    """Print text without reading markup into it, and without breaking its lines."""
    Console().print(printable_lines(text), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def opening(what: str, *, silent: bool = False) -> Iterator[None]:
    """Say at once what a command is about and, on a terminal, show what it waits for and for how long, until it begins.

    Args:
        what: what the command is about.
        silent: say and show nothing, as the output is for a program.
    """
    if silent:
        yield
        return
    console = get_console()  # the one that log messages go to: they appear above
    console.print(f"estune {__version__}: {printable(what)}", highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        yield
        return
    import estune.pool.waiting  # noqa: F401  # not by the thread that draws, while this one imports as well

    with console.status(_Waiting()):
        yield


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """What hears which share of something is done, 0 to 1, and shows it under `opening`, or says it now and then.

    Args:
        what: is done.
    """
    from estune.pool.waiting import told_while

    share = 0.0

    def told(now: float) -> None:
        nonlocal share
        share = now

    with told_while(what, so_far=lambda: f": {share:.0%}", share=lambda: share):
        yield told


class _Waiting:
    """Shows what is waited for at the moment when it is drawn."""

    def __init__(self) -> None:
        self._what = ""
        self._since = time.monotonic()

    def __rich__(self) -> RenderableType:
        from estune.pool.waiting import Wait, waited_for

        wait = waited_for() or Wait("getting ready")
        now = time.monotonic()
        if wait.what != self._what:
            self._what = wait.what
            self._since = now
        seconds = now - self._since
        said = Text(printable(wait.what))
        far = f"{wait.so_far()}  {seconds:.0f} s"
        said.truncate(max(BAR, get_console().width - len(far) - BESIDE), overflow="ellipsis")
        said.append(far)
        share = wait.share()
        if share is None:
            return said
        left = f"{seconds * (1 - share) / share:.0f} s left" if share else ""
        line = Table.grid(padding=(0, 2))
        line.add_column(no_wrap=True)
        line.add_row(said, ProgressBar(total=1.0, completed=share, width=BAR), left)
        return line


def say_table(
    rows: Sequence[Sequence[str]], names: int = 1, *, title: str = "", remarks: bool = False, total: bool = False
) -> None:
    """Print a table: a heading, then rows; the first columns are names, the others figures.

    Args:
        rows: cells; a heading of nothing but empty ones is left out.
        names: columns of names.
        title: stands above it.
        remarks: the last column says something of the figures.
        total: the last row is the sum of those above.
    """
    head, *body = rows
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
    table.title = f"\n{title}" if title else None
    table.show_header = any(head)
    for i, heading in enumerate(head):
        is_remark = remarks and i == len(head) - 1
        table.add_column(heading, justify="left" if i < names or is_remark else "right", no_wrap=not is_remark)
    for i, row in enumerate(body):
        table.add_row(*map(printable_lines, row), style="bold" if total and i == len(body) - 1 else None)
    console = wide_console()
    with console.capture() as printed:
        console.print(table, markup=False)
    console.file.write(re.sub(" +$", "", printed.get(), flags=re.MULTILINE))  # rich fills every line up


def wide_console() -> Console:
    """A console as wide as the terminal or, for a file, as wide as tables need."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(width=160, markup=False, highlight=False)
