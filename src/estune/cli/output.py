"""What commands print: text as it is, and tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def say(text: str) -> None:
    """Print text without reading markup into it, and without breaking its lines."""
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def say_table(rows: Sequence[Sequence[str]], names: int = 1) -> None:
    """Print a table: a heading, then rows; the first columns are names, the others figures."""
    head, *body = rows
    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(head):
        table.add_column(heading, justify="left" if i < names else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    wide_console().print(table, markup=False)


def wide_console() -> Console:
    """As wide as the terminal, or as tables need it in a file."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(width=160, markup=False, highlight=False)
