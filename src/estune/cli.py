"""The command line. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from estune.errors import EstuneError

if TYPE_CHECKING:
    from estune.estimate import Estimate, Item

app = typer.Typer(
    help=(
        "Fine-tune all weights of a language model with Evolution Strategies: for any reward, with inference alone.\n\n"
        "`estune train` without options teaches the embedded model Countdown in two minutes. Every setting is an "
        "option (`--sigma 0.01`, `--task.eval_size 500`) and a key of the config file."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML or TOML file of settings")]


@app.command(context_settings=SETTINGS)
def train(
    context: typer.Context,
    config: ConfigFile = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run, to the same bits")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check settings, model and data; write nothing")] = False,
) -> None:
    """Train a model. Give settings as `--key value`; `estune settings` lists them.

    With `--resume`, only `--steps` (a new total), `--model` (where the base model is now), `--workers` and what belongs
    to them can be given.
    """
    overrides = _overrides(context.args)
    if resume is not None:
        _resume(resume, config, overrides, dry_run)
        return
    from estune.config import load

    settings = load(config, overrides)
    if dry_run:
        from estune.commands import describe

        _print(describe(settings))
        return
    from estune.trainer import Trainer

    Trainer(settings).train()


@app.command("eval", context_settings=SETTINGS)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="a run's directory, a checkpoint directory, a hub id or tiny")],
    config: ConfigFile = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write the completions here, parquet")] = None,
) -> None:
    """Evaluate a run's best checkpoint, or any model, on a task's held-out set."""
    from estune.commands import evaluate_model

    metrics = evaluate_model(model, config, _overrides(context.args), output)
    table = Table(title=f"{model}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in metrics.items():
        table.add_row(key, f"{value:.4f}")
    Console().print(table)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="a run's directory")],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write the checkpoint to")],
    step: Annotated[int | None, typer.Option(help="after how many steps; all by default")] = None,
    model: Annotated[str | None, typer.Option(help="the base model, if it has moved")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the run's own by default")] = None,
) -> None:
    """Rebuild the checkpoint of any step from base model and journal, bit for bit, without an engine."""
    from estune.replay import replay as rebuild

    fingerprint = rebuild(run, output, step, model, dtype)
    _print(f"{output}: fingerprint {fingerprint} verified")


@app.command(context_settings=SETTINGS)
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

    from estune.commands import estimate_run

    found = estimate_run(config, _overrides(context.args), gpu=gpu, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print_estimate(found)


@app.command()
def settings(
    task: Annotated[str, typer.Option(help="list this task's options; `estune tasks` lists the tasks")] = "countdown",
) -> None:
    """List every setting with its default."""
    from estune.config import Config
    from estune.tasks import options_of

    table = Table("setting", "default", "what it is", title="settings of estune train")
    for prefix, fields in (("", Config.model_fields), ("task.", options_of(task).model_fields)):
        for name, field in fields.items():
            if name != "task":
                table.add_row(prefix + name, str(field.get_default(call_default_factory=True)), field.description)
    Console().print(table)


def main() -> None:
    """Run the command line; what the user can mend ends in one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    try:
        app()
    except (EstuneError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        line = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True).print(line, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        # A member may still be generating in a thread, which Python would wait for. The journal is whole at any time.
        sys.stdout.flush()
        os._exit(130)


def _print_estimate(found: Estimate) -> None:
    """Tables without lines, as wide as the terminal, or as they need to be in a file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    work, device = found.work, found.device
    console.print(
        f"{found.model}: {found.shape.parameters:,} parameters; {work.population} members x {work.prompts} prompts, "
        f"{work.at_once} at once\n{device.name}: {device.how}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    _print_items(console, "memory of a replica", found.memory, _size)
    _print_items(console, "time of a step, estimated", found.time, _duration)
    table = _grid("memory of reinforcement learning, all its devices together", "GRPO", "PPO", "")
    methods = {m: {item.name: item for item in items} for m, items in found.reinforcement_learning.items()}
    for name, item in methods["PPO"].items():
        grpo = methods["GRPO"].get(name)
        table.add_row(name, _size(grpo.amount) if grpo else "", _size(item.amount), item.how)
    sums = (sum(item.amount for item in items.values()) for items in methods.values())
    table.add_row("in all", *map(_size, sums), "", style="bold")
    console.print(table)
    table = _grid("what fits", "on devices", "on the host", "devices", "to this run", "")
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
    console.print(f"\n{found.advice}", highlight=False, markup=False, soft_wrap=True)


def _print_items(console: Console, title: str, items: list[Item], show: Callable[[float], str]) -> None:
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


def _overrides(arguments: list[str]) -> list[str]:
    """`--key value`, `--key=value` and `key=value` as `key=value`; a switch alone, `--key`, as `key`."""
    overrides, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if "=" in argument:
            overrides.append(argument.removeprefix("--"))
        elif argument.startswith("--") and rest and not rest[0].startswith("--"):
            overrides.append(f"{argument.removeprefix('--')}={rest.pop(0)}")
        elif argument.startswith("--"):
            overrides.append(argument.removeprefix("--"))
        else:
            raise EstuneError(f"unexpected argument {argument!r}: give settings as --key value")
    return overrides


def _resume(run: Path, config: Path | None, overrides: list[str], dry_run: bool) -> None:
    """A resumed run keeps its settings; only its length, and where its weights come from and are, may change."""
    from estune.config import read

    given = read(None, overrides)
    if config:
        raise EstuneError(f"--resume keeps the run's settings, found --config {config}; leave it out")
    if dry_run:
        from estune.commands import describe_rest

        _print(describe_rest(run, given))
        return
    from estune.trainer import Trainer

    Trainer.resume(run, **given).train()


def _print(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
