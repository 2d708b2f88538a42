"""Commands about several runs, or about one before or after it: to probe, to sweep, to compare, to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from estune.charts.words import amount
from estune.cli.options import ConfigFile, listed, overrides_of
from estune.cli.output import opening, say, say_table
from estune.errors import EstuneError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from estune.study.compare.plan import Plan
    from estune.study.probed import Probe
    from estune.study.sweep import Trial

Folder = Annotated[Path, typer.Option("--output-dir", "--output_dir", help="directory for all of it")]


def report(
    runs: Annotated[list[Path], typer.Argument(help="directories of runs")],
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = Path("report.html"),
) -> None:
    """Make one HTML page about runs, finished or not, that opens offline."""
    from estune.study.report import write_report

    write_report(runs, output)
    say(f"{output}: {output.stat().st_size / 1e3:,.0f} KB")


def probe(
    context: typer.Context,
    config: ConfigFile = None,
    members: Annotated[int, typer.Option(help="perturbations of each size")] = 8,
    prompts: Annotated[int, typer.Option(help="training prompts to answer, at most prompts_per_step")] = 100,
    sigmas: Annotated[
        str | None, typer.Option(help="sizes to try, with commas between; an eighth to eight times sigma by default")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(help="parts of the model to try, one by one: patterns of train_parameters, with ; between"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Try perturbations of several sizes and say which sigma to train with. Settings are given as to `estune train`."""
    from estune.config import load

    settings = load(config, overrides_of(context.args))
    try:
        sizes = None if sigmas is None else [float(size) for size in listed(sigmas) or ()]
    except ValueError as error:
        raise EstuneError(f"--sigmas {sigmas!r}: give numbers with commas between; {error}") from error
    tried = None if parts is None else [p for part in parts.split(";") if (p := part.strip())]
    if tried == []:
        raise EstuneError(f"--parts {parts!r}: give patterns of parameters' names, with semicolons between")
    arguments: dict[str, Any] = {"members": members, "prompts": prompts, "sigmas": sizes}
    with opening(f"probe {settings.model} on {settings.task.name}", silent=as_json):
        from estune.study.probe import probe as try_sizes
        from estune.study.probe import probe_parts

        if tried is None:
            found = try_sizes(settings, **arguments)
        else:
            by_part = probe_parts(settings, tried, None if as_json else _say_part, **arguments)
    if as_json:
        said = found.as_json() if tried is None else {part: one.as_json() for part, one in by_part.items()}
        print(json.dumps(said, indent=2))
    elif tried is None:
        _say_probe(found)
    else:
        _say_parts(by_part)


def _say_part(part: str, found: Probe) -> None:
    say(f"--train_parameters '{part}'")
    _say_probe(found)
    say("")


def _say_probe(found: Probe) -> None:
    say(
        f"{found.task} with {found.model}: {amount(found.members, 'members')} a sigma on "
        f"{amount(found.prompts, 'prompts')}; the base model's reward is {found.base:.4f}, "
        f"its noise floor {found.noise:.2g}\n"
    )
    say_table(found.rows())
    advice = "no sigma to recommend" if found.sigma is None else f"recommended: --sigma {found.sigma:g}"
    say("\n".join(["", f"{advice}: {found.reason}", *(f"warning: {text}" for text in found.warnings)]))


def _say_parts(found: Mapping[str, Probe]) -> None:
    from estune.study.probed import best_part, rows_of_parts

    say_table(rows_of_parts(found))
    best = best_part(found)
    if best is None:
        say("\nno member of any part earns more than the base: more members may find one that does")
        return
    level = found[best].recommended
    assert level is not None
    say(
        f"\nbest member: --train_parameters '{best}' --sigma {level.sigma:g}: it earns {level.best:.3g} where the base "
        f"earns {found[best].base:.3g}"
    )


def sweep(
    context: typer.Context,
    config: ConfigFile = None,
    output_dir: Folder = Path("runs/sweep"),
    jobs: Annotated[int, typer.Option(help="runs at a time")] = 1,
    search: Annotated[str | None, typer.Option(help="optuna: choose values by the runs before; allows ranges")] = None,
    trials: Annotated[int | None, typer.Option(help="how many combinations a search draws")] = None,
    metric: Annotated[str, typer.Option(help="of each run's best evaluation: what is compared")] = "eval_accuracy",
) -> None:
    """Train with every combination of `--sweep.KEY A,B,C`, and say which setting did what.

    With `--search optuna --trials N`, N combinations are chosen by the runs before, and `--sweep.KEY LOW..HIGH` is a
    range: `--sweep.sigma 0.001..0.1`, or of whole numbers `--sweep.population 10..60`. This needs Optuna: `pip install
    'estune[sweep]'`.

    Further settings are those of all runs. The same command again goes on where it was. Exit code 1 if a run failed.
    """
    from estune.journal.shares import shown
    from estune.study.sweep import sweep as run_all
    from estune.study.sweep_report import draw_effects, rows

    if search not in (None, "optuna"):
        raise EstuneError(f"--search {search!r}: there is optuna alone")
    if not metric.startswith(("eval_", "watch/")):
        raise EstuneError(f"--metric {metric!r}: give one of an evaluation, such as eval_accuracy or eval_reward")

    def told(trial: Trial) -> None:
        value = trial.metrics.get(metric)
        share = metric in trial.shares
        say(f"{trial.name}: " + (f"failed: {trial.error}" if value is None else f"{metric} {shown(value, share)}"))

    with opening(f"sweep in {output_dir}"):
        found = run_all(
            output_dir,
            config,
            overrides_of(context.args),
            jobs=jobs,
            search=cast(Literal["optuna"] | None, search),
            trials=trials,
            metric=metric,
            told=told,
        )
    lines = rows(found, metric)
    say("")
    say_table(lines, names=len(lines[0]) - 5)
    failed = [trial for trial in found if trial.error is not None]
    say("\n".join(["", *(f"{trial.name} failed: {trial.error}" for trial in failed)]))
    done = [trial for trial in found if trial.error is None]
    if done and not any(metric in trial.metrics for trial in done):
        raise EstuneError(f"--metric {metric}: no run has it; there are {', '.join(sorted(done[0].metrics))}")
    picture = output_dir / "effects.svg"
    try:
        draw_effects(found, picture, metric)
        say(f"effects of each setting: {picture}")
    except EstuneError as error:
        say(f"warning: {error}")
    if failed:
        raise typer.Exit(1)


def compare(
    context: typer.Context,
    config: ConfigFile = None,
    output_dir: Folder = Path("runs/compare"),
    methods: Annotated[
        str | None, typer.Option(help="some of es,grpo,dr_grpo,dapo,rloo, all by default; ppo is rloo")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="tokens that each run generates; 1e6 by default")] = None,
    seeds: Annotated[str | None, typer.Option(help="seeds, with commas between; 0,1,2 by default")] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="learning rates that RL chooses from, with commas between; 1e-6,1e-5,1e-4,1e-3 by default"),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="completions of an RL step; 256 by default")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="of them in one backward pass, at most; fewer take less memory; 32 by default")
    ] = None,
    generations: Annotated[
        int | None, typer.Option(help="completions of a prompt in a group of RL's; 8 by default")
    ] = None,
    rl_temperature: Annotated[float | None, typer.Option(help="at which RL draws; 1 by default")] = None,
    beta: Annotated[float | None, typer.Option(help="weight of RL's KL penalty; 0 by default")] = None,
    points: Annotated[
        int | None, typer.Option(help="of each learning curve, evaluated when the run is over; none by default")
    ] = None,
    short_tokens: Annotated[
        int | None, typer.Option(help="an answer of so many tokens is short; half of the base's mean length by default")
    ] = None,
) -> None:
    """Train one model by Evolution Strategies and by TRL's reinforcement learning, with one budget.

    Settings are given as to `estune train`. The same command again goes on. Exit code 1 if a run failed.
    """
    from estune.config import load

    chosen = listed(methods)
    if chosen and "ppo" in chosen:
        say("note: TRL has no PPO trainer any more; its nearest kin, rloo, runs in ppo's place")
        chosen = list(dict.fromkeys("rloo" if method == "ppo" else method for method in chosen))
    plan = _plan(
        methods=chosen,
        budget=budget,
        seeds=listed(seeds),
        rates=listed(rates),
        batch=batch,
        micro_batch=micro_batch,
        generations=generations,
        rl_temperature=rl_temperature,
        beta=beta,
        points=points,
        short_tokens=short_tokens,
    )
    settings = load(config, overrides_of(context.args))
    from estune.journal.shares import shown
    from estune.study.compare.plan import Job
    from estune.study.compare.report import are_shares, over_budget, table, write_report
    from estune.study.compare.run import compare as run_all

    def told(result: dict[str, Any]) -> None:
        failed = "error" in result
        what = f"failed: {result['error']}" if failed else f"accuracy {shown(result['accuracy'], are_shares([result]))}"
        say(f"{Job(**result['job']).name}: {what}")

    count = len(plan.trials()) + len(plan.methods) * len(plan.seeds)
    with opening(
        f"compare {', '.join(plan.methods)} on {settings.task.name} with {settings.model}: {amount(count, 'runs')} of "
        f"{plan.budget:,} tokens each, in {output_dir}"
    ):
        results = run_all(plan, settings, output_dir, told)
    path = write_report(output_dir, results, plan, settings)
    lines = table(results)
    say("")
    say_table(lines, names=1)
    if len(lines) > 1:
        say(f"\n{over_budget(results, plan.budget)}")
    say(f"\n{path}")
    if len(lines) == 1 or any("error" in result for result in results if not result["job"]["trial"]):
        raise typer.Exit(1)


def _plan(**given: Any) -> Plan:
    """The plan of a comparison, from the options that were given.

    Raises:
        EstuneError: some options cannot be used; the message names each.
    """
    from pydantic import ValidationError

    from estune.study.compare.plan import Plan

    try:
        return Plan.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = [f"--{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}" for fault in error.errors()]
        raise EstuneError("; ".join(faults)) from error
