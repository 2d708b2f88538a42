"""The command that says what a run would need, and its tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from estune.charts.words import DAY, amount, duration
from estune.cli.options import ConfigFile, overrides_of
from estune.cli.output import opening, say, say_table

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
    lengths: Annotated[
        Path | None,
        typer.Option(help="lengths of completions: a run's directory, its journal, or what probe --json printed"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Say what a run would need: memory, about how long it takes with how many workers, and what RL would need instead.

    Settings are given as to `estune train`. Of the model only config.json is read, and nothing else is downloaded.
    """
    from dataclasses import asdict

    with opening("estimate", silent=as_json):
        from estune.study.estimate.run import estimate_run

        found = estimate_run(
            config,
            overrides_of(context.args),
            gpu=gpu,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            lengths=lengths,
        )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _say_estimate(found)


def _say_estimate(found: Estimate) -> None:
    work = found.work
    device = found.device
    count = f"{work.devices} x " if work.devices > 1 else ""
    say(
        f"{found.model}: {found.shape.parameters:,} parameters; {amount(work.population, 'members')} x "
        f"{amount(work.prompts, 'prompts')} on {amount(work.engines, 'engines')}\n"
        f"{count}{device.name}: {device.how}"
    )
    who = "a replica" if work.workers is None else "a worker"
    each = f", on each of its {work.parallel} GPUs" if work.parallel > 1 else ""
    _say_items(f"memory of {who}{each}", found.memory, _size)
    _say_items("time of a step, estimated", found.time, duration)
    _say_speeds(found)
    say_outlook(found)
    if len(found.splits) > 1:
        _say_splits(found)
    if found.scales:
        _say_scales(found)
    _say_reinforcement_learning(found)
    rows = [["", "on devices", "on the host", "devices", "times"]]
    for choice in found.choices:
        host = _size(choice.host) if choice.host else ""
        devices = "too large" if choice.devices is None else str(choice.devices)
        share = f"{choice.needed / found.choices[0].needed:.1f}"
        rows.append([choice.name, _size(choice.needed), host, devices, share])
    say_table(rows, title="what fits: memory on all devices together, and how many times this run's")
    say(f"\n{found.advice}")


def _say_items(title: str, items: Sequence[Item], show: Callable[[float], str]) -> None:
    rows = [[item.name, show(item.amount), item.how] for item in items]
    whole = ["in all", show(sum(item.amount for item in items)), ""]
    say_table([["", "", ""], *rows, whole], title=title, remarks=True, total=True)


def _say_speeds(found: Estimate) -> None:
    """Say how long the whole run takes by each engine."""
    rows = [["", "a member", "a step", "tokens/s", amount(found.work.steps, "steps"), ""]]
    for speed in found.speeds:
        how = f"{speed.rows} rows at once, {1e3 * speed.token:.3g} ms a token, mostly {speed.limit}"
        figures = [
            duration(speed.member),
            duration(speed.step),
            f"{speed.tokens_per_second:,.0f}",
            duration(DAY * speed.days),
        ]
        rows.append([speed.engine, *figures, how])
    say_table(rows, title="the whole run, evaluations included, by engine", remarks=True)


def say_outlook(found: Estimate, *, in_turns: bool = False) -> None:
    """Say the line that `estune train` also says, once it has measured its pace.

    Args:
        found: what is estimated.
        in_turns: completions are turns of rollouts, of which the estimate counts one each.
    """
    from estune.run.monitors.pace import outlook, too_long

    work = found.work
    tokens = work.population * work.prompts * work.max_new_tokens
    speed = found.speeds[0]
    run = DAY * speed.days
    most = work.new_tokens == work.max_new_tokens
    how = f"estimated for {found.device.name}, not measured" + (", one turn a rollout" if in_turns else "")
    say(outlook(tokens, speed.step, run, most=most, how=how))
    if warning := too_long(run):
        say(f"warning: {warning}")


def _say_splits(found: Estimate) -> None:
    """Say how long a step takes with its completions shared out over fewer members, or more."""
    rows = [["members x prompts", "a step", "tokens/s"]]
    for split in found.splits:
        count = f"{split.population} x {split.prompts}"
        rows.append([count, duration(split.step), f"{split.tokens_per_second:,.0f}"])
    say_table(rows, title="a step of as many completions")


def _say_scales(found: Estimate) -> None:
    """Say how long it takes by number of workers, up to where more gain nothing."""
    rows = [["workers", "GPUs", "a step", "efficiency", "tokens/s", "the run", "GPU-hours"]]
    steps = [scale.step for scale in found.scales]
    for scale in found.scales[: steps.index(min(steps)) + 1]:
        rows.append(
            [
                str(scale.workers),
                str(scale.devices),
                duration(scale.step),
                f"{scale.efficiency:.0%}",
                f"{scale.tokens_per_second:,.0f}",
                duration(DAY * scale.days),
                f"{scale.device_hours:,.3g}" if scale.device_hours < 1000 else f"{scale.device_hours:,.0f}",
            ]
        )
    say_table(rows, names=0, title=f"with more or fewer workers, {found.speeds[0].engine}")
    spare = -found.work.population % found.work.engines
    if spare:
        say(
            f"population={found.work.population + spare} would take about as long: "
            f"{amount(spare, 'workers')} would end a member early"
        )


def _say_reinforcement_learning(found: Estimate) -> None:
    """Say the memory by method; cells are empty for what GRPO does without."""
    grpo, ppo = ({item.name: item for item in found.reinforcement_learning[m]} for m in ("GRPO", "PPO"))
    rows = [["", "GRPO", "PPO", ""]]
    for name, item in ppo.items():
        rows.append([name, _size(grpo[name].amount) if name in grpo else "", _size(item.amount), item.how])
    sums = [_size(sum(item.amount for item in items.values())) for items in (grpo, ppo)]
    title = "memory of reinforcement learning, all its devices together"
    say_table([*rows, ["in all", *sums, ""]], title=title, remarks=True, total=True)


def _size(count: float) -> str:
    """Bytes, in units of a thousand."""
    for unit in ("GB", "MB", "kB"):
        scale = {"GB": 1e9, "MB": 1e6, "kB": 1e3}[unit]
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} B"
