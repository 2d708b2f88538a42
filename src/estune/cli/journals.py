"""Commands about a run's journal: to read, to prove, to compare, to go on from, to add up, to share."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from estune.charts.words import amount
from estune.cli.options import ConfigFile, TrustTask, listed, overrides_of
from estune.cli.output import opening, progress, say, say_table
from estune.errors import EstuneError

Run = Annotated[Path, typer.Argument(help="a run's directory, or its journal in the compact form")]
BaseModel = Annotated[str | None, typer.Option("--model", help="the base model, if it has moved")]


def log(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="print an object a line, with all metrics")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="print them as CSV, with all metrics")] = False,
) -> None:
    """Show a run's steps, rewards and evaluations."""
    from estune.journal.log import log as rows_of

    rows = rows_of(run)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    if as_csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    heading = ["", "step", "reward", "std", "best", "failed", "held-out accuracy", "held-out reward", "fingerprint"]
    keys = [
        "kind",
        "step",
        "reward",
        "reward_std",
        "reward_max",
        "failed",
        "eval_accuracy",
        "eval_reward",
        "fingerprint",
    ]
    body = [[*(_cell(row.get(key)) for key in keys), _going_back(row)] for row in rows]
    say_table([[*heading, ""], *body], remarks=True)


def verify(
    run: Run,
    model: BaseModel = None,
    signed_by: Annotated[Path | None, typer.Option(help="public key of who must have signed it")] = None,
) -> None:
    """Take a run's steps again, and say what is proven: of every recorded fingerprint, and of its checkpoints."""
    from estune.journal.journal import Journal
    from estune.journal.signature import refuse_unsigned
    from estune.journal.verify import verify as prove

    if signed_by is not None:
        refuse_unsigned(Journal.read(run), signed_by)
    with opening(f"verify {run}"), progress("replaying") as told:
        proof = prove(run, model, told)
    say(f"journal: {amount(proof.steps, 'steps')}, every line matches its checksum, sha256 {proof.sha256}")
    if signed_by is not None:
        say(f"signature: by {signed_by}, of this journal as it is")
    say(f"base model: {proof.base}, to the bit the one that it was written over")
    say(f"weights: {proof.fingerprints} recorded fingerprints, each that of the weights which its steps give")
    for name, step in proof.checkpoints.items():
        say(f"{name}/: the weights after step {step}, to the bit")
    say("not proven by this: that the rewards were these, which only training again tells")
    if proof.missing:
        say(f"the journal may lack its last steps: {proof.missing}")


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="a run's directory, or its journal in the compact form")],
    b: Annotated[Path, typer.Argument(metavar="B", help="another one")],
    no_weights: Annotated[bool, typer.Option("--no-weights", help="do not replay them to compare weights")] = False,
    model: BaseModel = None,
    as_json: Annotated[bool, typer.Option("--json", help="print it as JSON")] = False,
) -> None:
    """Say in what two runs differ: settings, data, the first step that is another, their weights by layer."""
    from estune.journal.diff import diff as compare

    if as_json:
        found = compare(a, b, (model, model), weights=not no_weights)
        print(json.dumps({**vars(found), "layers": [vars(layer) for layer in found.layers]}))
        return
    with opening(f"diff {a} {b}"), progress("replaying both") as told:
        found = compare(a, b, (model, model), weights=not no_weights, told=told)
    for title, pairs in (("settings", found.settings), ("what they began with", found.begun_with)):
        if pairs:
            rows = [[name, _cell(one), _cell(other)] for name, (one, other) in pairs.items()]
            say_table([[title, "A", "B"], *rows])
        else:
            say(f"{title}: the same")
    steps = f"{found.steps[0]} and {found.steps[1]} steps"
    if found.first is None:
        say(f"{steps}: all that both have are the same")
    else:
        say(f"{steps}: the first that is another is step {found.first}, in {', '.join(found.fields)}")
    _say_layers(found.layers)
    if found.why and not no_weights:
        say(f"their weights were not compared: {found.why}")


def branch(
    context: typer.Context,
    run: Run,
    step: Annotated[int | None, typer.Option(help="after how many of its steps; all by default")] = None,
    config: ConfigFile = None,
    trust_task: TrustTask = False,
) -> None:
    """Train a new run from where another one stood after some step. Settings are the run's but for those given."""
    from estune.config import read

    given = read(config, overrides_of(context.args))
    with opening(f"branch {run}"):
        from estune.run.branch import branch as begin

        trainer = begin(run, step, trust_task=trust_task, **given)
    trainer.train()


def merge(
    runs: Annotated[list[Path], typer.Argument(help="two runs or more over one base model")],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write the merged run to")],
    weights: Annotated[str | None, typer.Option(help="by what the change of each is multiplied, as 1,0.5")] = None,
    model: BaseModel = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="do not evaluate it on the task of each run")] = False,
    trust_task: TrustTask = False,
) -> None:
    """Add up what several runs did to one base model: a new run, with its own journal and checkpoint."""
    from estune.journal.diff import diff as compare
    from estune.journal.merge import merge as add_up

    factors = _numbers(weights)
    with opening(f"merge {', '.join(map(str, runs))}"), progress("replaying") as told:
        add_up(runs, output, factors, model, told)
        between = compare(runs[0], runs[1], (model, model)) if len(runs) == 2 else None
    say(f"{output}: the sum of {len(runs)} runs, a journal and final/")
    if between is not None:
        _say_layers(between.layers)
    if not no_eval:
        _evaluate_on_each(runs, output / "final", trust_task=trust_task)


def pack(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write, by custom NAME.estune")],
) -> None:
    """Write a run's journal in the compact form: one small file, which every command takes for the run."""
    from estune.journal.share import pack as write

    size = write(run, output)
    say(f"{output}: {size:,} bytes")


def swap(
    server: Annotated[str, typer.Argument(help="address of a vLLM server, as http://HOST:PORT")],
    run: Run,
    step: Annotated[int | None, typer.Option(help="after how many steps; all by default; 0 is the base")] = None,
    keep: Annotated[int, typer.Option(min=0, help="bases that the server may keep in memory to come back to")] = 2,
) -> None:
    """Make a vLLM server serve a run's weights after some step, in place; its key in VLLM_API_KEY."""
    from estune.run.swap import swap as put

    with opening(f"swap {server} to {run}"), progress("replaying there"):
        found = put(server, run, step, keep=keep)
    how = {"kept": "it had them still", "rebuilt": f"rebuilt from the base by {amount(found.updates, 'steps')}"}
    how["advanced"] = f"by {amount(found.updates, 'steps more')}"
    say(f"{server}: serves fingerprint {found.fingerprint}, {how[found.how]}, {found.seconds:.2f} s")


def sign(
    run: Run,
    key: Annotated[Path, typer.Option(help="file of your private SSH key, such as ~/.ssh/id_ed25519")],
) -> None:
    """Sign a run's journal, so that whoever has your public key sees that it is yours and unchanged."""
    from estune.journal.signature import sign as write

    say(f"{write(run, key)}: written; `estune verify {run} --signed-by {key}.pub` checks it")


def push(
    run: Run,
    name: Annotated[str, typer.Argument(help="of the model on the hub")],
    step: Annotated[int | None, typer.Option(help="the weights after so many steps; the best by default")] = None,
    journal_only: Annotated[bool, typer.Option("--journal-only", help="upload no checkpoint")] = False,
    private: Annotated[bool, typer.Option("--private", help="make it private, if it is made")] = False,
    revision: Annotated[str | None, typer.Option(help="the branch to write to")] = None,
) -> None:
    """Upload a run to the hub: its checkpoint, a model card and its journal."""
    from estune.run.hub import push as upload

    options: dict[str, Any] = {"journal_only": journal_only, "private": private or None, "revision": revision}
    with opening(f"push {run} to {name}"), progress("uploading") as told:
        address = upload(run, name, step, told=told, **options)
    say(address)


def pull(
    name: Annotated[str, typer.Argument(help="of the model on the hub, which `estune push` uploaded")],
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to make")],
    revision: Annotated[str | None, typer.Option(help="a branch, a tag or a commit")] = None,
) -> None:
    """Download a run from the hub."""
    from estune.run.hub import pull as download

    with opening(f"pull {name}"), progress("downloading"):
        download(name, output, revision=revision)
    say(f"{output}: prove it by `estune verify {output}`")


def _evaluate_on_each(runs: Sequence[Path], merged: Path, *, trust_task: bool) -> None:
    """Show what each run's best checkpoint and the merged one reach on the task of each run."""
    from estune.run.evaluate import evaluate_model

    rows = [["held out", "its own", "merged"]]
    for run in runs:
        found: list[dict[str, float]] = []
        for checkpoint in (None, merged):
            with opening(f"evaluate {checkpoint or run} on the task of {run}"):
                try:
                    found.append(evaluate_model(str(run), checkpoint=checkpoint, trust_task=trust_task))
                except EstuneError as error:
                    say(f"not evaluated: {error}")
                    found.append({})
        for key in ("eval_accuracy", "eval_reward"):
            rows.append([f"{run}: {key.removeprefix('eval_')}", *(_cell(each.get(key)) for each in found)])
    if len(rows) > 1:
        say_table(rows)


def _say_layers(layers: Sequence[Any]) -> None:
    if layers:
        heading = ["layer", "A to B", "A to base", "B to base", "cosine of the two changes"]
        rows = [
            [layer.layer, *(f"{size:.3e}" for size in (layer.between, *layer.moved)), _angle(layer.cosine)]
            for layer in layers
        ]
        say_table([heading, *rows], title="Weights, as shares of the norm of A's base", total=True)


def _angle(cosine: float) -> str:
    return "one has not moved" if math.isnan(cosine) else f"{cosine:+.4f}"


def _numbers(text: str | None) -> list[float] | None:
    """The weights of a sum."""
    try:
        return None if text is None else [float(part) for part in listed(text) or []]
    except ValueError as error:
        raise EstuneError(f"--weights: {text!r} is no list of numbers; give one for each run, as 1,0.5") from error


def _going_back(row: dict[str, Any]) -> str:
    """What is to be said of a step that was taken back, or of an evaluation that took steps back."""
    if "back" in row:
        return f"back to step {row['back']}"
    return "taken back" if row.get("undone") or row.get("taken_back") else ""


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)
