"""Commands about one run: to train, to evaluate, to have members answer together, to rebuild."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from estune.cli.options import AcceptChanges, ConfigFile, TrustTask, overrides_of
from estune.cli.output import opening, progress, say, say_table
from estune.errors import EstuneError, printable

if TYPE_CHECKING:
    from estune.run.dry_run import Outline


def train(
    context: typer.Context,
    config: ConfigFile = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run, to the same bits")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check settings, model and data; write nothing")] = False,
    accept_changes: AcceptChanges = False,
    trust_task: TrustTask = False,
) -> None:
    """Train a model. Give settings as `--key value`; `estune train --help` lists them.

    With `--resume`, only `--steps` (a new total), `--model` (where the base model is now), `--trust_remote_code`,
    `--workers` and what belongs to them, how rewards may fail and `--report_to` can be given.
    """
    overrides = overrides_of(context.args)
    if resume is not None:
        _resume(resume, config, overrides, dry_run, accept_changes=accept_changes, trust_task=trust_task)
        return
    if accept_changes or trust_task:
        raise EstuneError(
            "--accept-changes and --trust-task are about a run that there is: give --resume RUN with them"
        )
    from estune.config import load

    settings = load(config, overrides)
    if dry_run:
        with opening(f"look at {settings.model} on {settings.task.name}, and train nothing"):
            from estune.run.dry_run import describe

            described = describe(settings)
        say(described.text)
        _say_time(config, overrides, described)
        return
    with opening(f"train {settings.model} on {settings.task.name}"):
        from estune.pool.launch import launch_ahead

        launch_ahead(settings)
        from estune.run.trainer import Trainer

        trainer = Trainer(settings)
    trainer.train()


def _say_time(config: Path | None, overrides: list[str], described: Outline) -> None:
    """How long a run would take, by arithmetic: where nothing is loaded, nothing is measured."""
    from estune.cli.estimate import say_outlook
    from estune.study.estimate.run import estimate_run

    try:
        found = estimate_run(config, overrides, prompt_tokens=described.prompt_tokens, held_out=described.held_out)
        say_outlook(found, in_turns=described.in_turns)
    except EstuneError as error:
        say(f"how long it takes cannot be estimated here: {error}")


def _resume(run: Path, config: Path | None, overrides: list[str], dry_run: bool, **insists: Any) -> None:
    """A resumed run keeps its settings; only those of `RESUMABLE` may change."""
    from estune.config import read

    given = read(None, overrides)
    if config:
        raise EstuneError(f"--resume keeps the run's settings, found --config {config}; leave it out")
    if dry_run:
        from estune.run.dry_run import describe_rest

        say(describe_rest(run, given, **insists))
        return
    with opening(f"go on with {run}"):
        from estune.run.trainer import Trainer

        trainer = Trainer.resume(run, **insists, **given)
    trainer.train()


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="a run's directory, a checkpoint directory, a hub id or tiny")],
    config: ConfigFile = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write the completions here, parquet")] = None,
    accept_changes: AcceptChanges = False,
    trust_task: TrustTask = False,
) -> None:
    """Evaluate a run's best checkpoint, or any model, on a task's held-out set.

    `--eval_samples 8 --eval_temperature 0.8` tells pass@k and mean@k, `--watch math,code` evaluates on these too.
    """
    if any(argument.split("=")[0] == "--model" for argument in (model, *context.args)):
        raise EstuneError("the model to evaluate comes without --model: estune eval RUN, or a checkpoint or a hub id")
    insists: dict[str, Any] = {"accept_changes": accept_changes, "trust_task": trust_task}
    with opening(f"evaluate {model}"):
        from estune.run.evaluate import evaluate_model

        metrics = evaluate_model(model, config, overrides_of(context.args), output, **insists)
    table = Table(title=model)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in metrics.items():
        table.add_row(escape(printable(key.removeprefix("eval_"))), f"{value:.4f}")
    Console().print(table)


def ensemble(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="a run's directory, a checkpoint directory, a hub id or tiny")],
    config: ConfigFile = None,
    members: Annotated[int, typer.Option(help="members that are drawn and tried")] = 64,
    top: Annotated[int, typer.Option(help="members that are kept")] = 5,
    prompts: Annotated[
        int | None, typer.Option(help="training prompts each answers; prompts_per_step by default")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="of a run, after how many steps; its best evaluation by default")
    ] = None,
    of_step: Annotated[bool, typer.Option("--of-step", help="try the members that the run tried after them")] = False,
    given: Annotated[
        Path | None, typer.Option("--from", help="members chosen before: a file of -o; no new ones")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write seeds and figures here, JSON")] = None,
    save: Annotated[Path | None, typer.Option(help="write the merged model here, a checkpoint")] = None,
    accept_changes: AcceptChanges = False,
    trust_task: TrustTask = False,
) -> None:
    """Keep the best of many members around a run's weights, or any model, and answer by their vote, or merged.

    Settings are given as to `estune eval`; `--sigma` is how far members are from the base.
    """
    insists: dict[str, Any] = {"accept_changes": accept_changes, "trust_task": trust_task}
    with opening(f"ensemble around {model}"):
        from estune.run.ensemble import Ensemble
        from estune.run.ensemble import ensemble as gather

        found = gather(
            model,
            config,
            overrides_of(context.args),
            members=members,
            top=top,
            prompts=prompts,
            step=step,
            of_step=of_step,
            given=None if given is None else Ensemble.read(given),
            save=save,
            **insists,
        )
    if output is not None:
        found.write(output)
    say(f"{len(found.members)} of {found.tried} members, sigma {found.sigma:g}, on {found.task}\n")
    say_table(found.rows())
    if "vote" not in found.figures:
        say(f"\nno vote: the task {found.task} says of no completion what its final answer is")


def replay(
    run: Annotated[Path, typer.Argument(help="a run's directory, or its journal in the compact form")],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write the checkpoint to")],
    step: Annotated[int | None, typer.Option(help="after how many steps; all by default")] = None,
    model: Annotated[str | None, typer.Option(help="the base model, if it has moved")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16 or packed; that of `best` by default"),
    ] = None,
    accept_changes: AcceptChanges = False,
) -> None:
    """Rebuild the checkpoint of any step from base model and journal, bit for bit, without an engine."""
    from estune.journal.journal import Journal
    from estune.journal.replay import replay as rebuild

    with opening(f"replay {run}"), progress("replaying") as told:
        fingerprint = rebuild(run, output, step, model, dtype, accept_changes=accept_changes, told=told)
    missing = Journal.read(run).shortfall() if step is None else None
    say(f"{output}: fingerprint {fingerprint} " + (f"is that of its last step ({missing})" if missing else "verified"))
