"""The command that says what a run would need, and its tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from estune.cli.options import ConfigFile, overrides_of
from estune.cli.output import say, wide_console

if TYPE_CHECKING:
    from estune.study.estimate.estimate import Estimate
    from estune.study.estimate.needs import Item


def estimate(
    context: typer.Context,
    config: ConfigFile = None,
    gpu: Annotated[str | None, typer.Option(help="h100, a100-40, rtx4090, ...; this machine by default")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="mean length of a prompt; Countdown's by default")] = None,
    new_tokens: Annotated[
        float | None, typer.Option(help="mean length of a completion; the longest by default")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Say what a run would need: memory, about how long a step takes, and what RL would need instead.

    Settings are given as to `estune train`. Of the model only config.json is read, and nothing else is downloaded.
    """
    from dataclasses import asdict

    from estune.study.estimate.run import estimate_run

    found = estimate_run(
        config, overrides_of(context.args), gpu=gpu, prompt_tokens=prompt_tokens, new_tokens=new_tokens
    )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _say_estimate(found)


def _say_estimate(found: Estimate) -> None:
    """Tables without lines, as wide as the terminal, or as they need to be in a file."""
    console, work, device = wide_console(), found.work, found.device
    count = f"{work.devices} x " if work.devices > 1 else ""
    say(
        f"{found.model}: {found.shape.parameters:,} parameters; {work.population} members x {work.prompts} prompts, "
        f"{work.engines} at once\n{count}{device.name}: {device.how}"
    )
    who = "a replica" if work.workers is None else "a worker"
    each = f", on each of its {work.parallel} GPUs" if work.parallel > 1 else ""
    _say_items(console, f"memory of {who}{each}", found.memory, _size)
    _say_items(console, "time of a step, estimated", found.time, _duration)
    table = _grid("memory of reinforcement learning, all its devices together", "GRPO", "PPO", "")
    methods = {m: {item.name: item for item in items} for m, items in found.reinforcement_learning.items()}
    for name, item in methods["PPO"].items():
        grpo = methods["GRPO"].get(name)
        table.add_row(name, _size(grpo.amount) if grpo else "", _size(item.amount), item.how)
    sums = (sum(item.amount for item in items.values()) for items in methods.values())
    table.add_row("in all", *map(_size, sums), "", style="bold")
    console.print(table)
    table = _grid("what fits", "on all devices", "on the host", "devices", "to this run", "")
    for choice in found.choices:
        table.add_row(
            choice.name,
            _size(choice.needed),
            _size(choice.host) if choice.host else "",
            "too large" if choice.devices is None else str(choice.devices),
            f"{choice.needed / found.choices[0].needed:.1f}",
            "",
        )
    console.print(table)
    say(f"\n{found.advice}")


def _say_items(console: Console, title: str, items: list[Item], show: Callable[[float], str]) -> None:
    table = _grid(title, "", "")
    for item in items:
        table.add_row(item.name, show(item.amount), item.how)
    table.add_row("in all", show(sum(item.amount for item in items)), style="bold")
    console.print(table)


def _grid(title: str, *columns: str) -> Table:
    """A table of names, right-aligned figures, and a last column without a heading for what is said about them."""
    table = Table(box=None, title=f"\n{title}", title_justify="left", title_style="bold", pad_edge=False)
    table.show_header = any(columns)
    table.add_column("", no_wrap=True)
    for i, column in enumerate(columns):
        last = i == len(columns) - 1
        table.add_column(column, justify="left" if last else "right", no_wrap=not last)
    return table


def _size(count: float) -> str:
    """Bytes, in units of a thousand."""
    for unit in ("GB", "MB", "kB"):
        scale = {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    if seconds >= 60:
        return f"{seconds / 60:.3g} min"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
