"""The command line. Heavy imports wait until a command runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from estune.errors import EstuneError

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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check settings, model and data; train nothing")] = False,
) -> None:
    """Train a model. Give settings as `--key value`; `estune settings` lists them."""
    overrides = _overrides(context.args)
    if resume is not None:
        from estune.trainer import Trainer

        steps = _resume_steps(config, overrides)
        Trainer.resume(resume, steps=steps).train()
        return
    from estune.config import load

    settings = load(config, overrides)
    if dry_run:
        _dry_run(settings)
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
    Console().print(f"{output}: fingerprint {fingerprint} verified", highlight=False)


@app.command()
def settings() -> None:
    """List every setting with its default."""
    from estune.config import Config
    from estune.tasks import TaskConfig

    table = Table("setting", "default", "what it is", title="settings of estune train")
    for prefix, fields in (("", Config.model_fields), ("task.", TaskConfig.model_fields)):
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
        sys.exit(130)


def _overrides(arguments: list[str]) -> list[str]:
    """`--key value`, `--key=value` and `key=value` as `key=value`."""
    overrides, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if "=" in argument:
            overrides.append(argument.removeprefix("--"))
        elif argument.startswith("--") and rest and not rest[0].startswith("--"):
            overrides.append(f"{argument.removeprefix('--')}={rest.pop(0)}")
        elif argument.startswith("--"):
            overrides.append(f"{argument.removeprefix('--')}=true")
        else:
            raise EstuneError(f"unexpected argument {argument!r}: give settings as --key value")
    return overrides


def _resume_steps(config: Path | None, overrides: list[str]) -> int | None:
    """A resumed run keeps its settings; only its length may change."""
    other = [o for o in overrides if not o.startswith("steps=")]
    if config or other:
        raise EstuneError(
            f"--resume keeps the run's settings, found {str(config) if config else other[0]}; only --steps may change"
        )
    try:
        return int(overrides[-1].partition("=")[2]) if overrides else None
    except ValueError as error:
        raise EstuneError(f"--steps must be a whole number, found {overrides[-1].partition('=')[2]!r}") from error


def _dry_run(settings: Any) -> None:
    from estune.commands import describe

    Console().print(describe(settings), highlight=False)


if __name__ == "__main__":
    main()
