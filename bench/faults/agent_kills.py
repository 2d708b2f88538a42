"""A run of rollouts by programs, its agents, replicas and trainer killed at random, against the same run undisturbed.

    python -m bench.faults.agent_kills [--steps 20] [--kills 20] [--seed 0]

Kills (SIGKILL) go in turns to a program that plays a rollout, to the process of a replica, which serves an endpoint of
its own, and to the trainer, which serves the other; a trainer is resumed. Records whether the two journals are the same
but for the times and all transcripts are equal; how many processes were left behind by a trainer that was killed; and,
of the requests that were answered, under whatever key, how many with a text that the undisturbed run has not in that
place: as weights differ from member to member, that is what an answer by other weights would be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from bench.common import options, rounded, settings, write_result

from estune.journal.journal import Journal

ROOT = Path(__file__).parents[2]
REPLICA = "estune.pool.process"
LOGGED = """
with open(os.environ["ANSWERS"], "a") as log:
    print(json.dumps([os.environ["OPENAI_API_KEY"], os.environ["ESTUNE_SEED"], messages]), file=log)
"""


def write_agent(folder: Path) -> Path:
    """The documentation's agent, which also writes down what it was answered, after each answer."""
    text = (ROOT / "examples" / "agent.py").read_text()
    asked = '    messages += [{"role": "assistant", "content": said}'
    assert asked in text
    before, _, after = text.partition(asked)
    line, _, rest = after.partition("\n")
    agent = folder / "agent.py"
    agent.write_text(before + asked + line + LOGGED.replace("\n", "\n    ").rstrip() + "\n" + rest)
    return agent


def command(folder: Path, args: argparse.Namespace) -> list[str]:
    """What starts the run, or goes on with it."""
    run = folder / "run"
    estune = [sys.executable, "-m", "estune.cli", "train"]
    if (run / "journal.jsonl").exists():
        return [*estune, "--resume", str(run), "--trust-task"]
    return [
        *(*estune, "--task", "custom", "--task.data", str(ROOT / "examples" / "facts.jsonl")),
        *("--task.program", f"{sys.executable} -I -S {write_agent(folder)}", "--output_dir", str(run)),
        *("--steps", str(args.steps), "--population", "4", "--prompts_per_step", "4", "--max_new_tokens", "24"),
        *("--eval_steps", "0", "--log_completions", "4", "--replicas", "2", "--threads", "1", "--report_to", "none"),
        *("--sigma", "0.02", "--learning_rate", "0.03", "--worker_timeout", "60", "--rollouts_at_once", "4"),
    ]


def started(folder: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "ANSWERS": str(folder / "answers.jsonl")}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command(folder, args), env=environment, stdout=log, stderr=log)


def steps_of(folder: Path) -> int:
    try:
        return len(Journal.read(folder / "run").steps)
    except Exception:  # not there yet, or its last line is being written
        return 0


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def victim(process: subprocess.Popen[bytes], kind: str, agent: Path, chance: random.Random) -> psutil.Process | None:
    """A process of a kind, if there is one now."""
    if kind == "trainer":
        return psutil.Process(process.pid)
    found = []
    for child in family(process):
        try:
            line = child.cmdline()
        except psutil.Error:
            continue
        # One that is about to become another program still has the trainer's command line.
        if (line[-1:] == [str(agent)]) if kind == "agent" else (REPLICA in line):
            found.append(child)
    return chance.choice(found) if found else None


def disturbed(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run to the end, with kills on the way."""
    chance = random.Random(args.seed)
    process = started(folder, args)
    log: list[dict[str, Any]] = []
    left = 0
    for number in range(args.kills):
        kind = ("agent", "replica", "agent", "trainer")[number % 4]
        due = number * (args.steps - 2) // args.kills
        while steps_of(folder) < due and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        while process.poll() is None:
            target = victim(process, kind, folder / "agent.py", chance)
            if target is None or (kind == "trainer" and not (folder / "run" / "journal.jsonl").exists()):
                time.sleep(0.002)
                continue
            others = family(process)
            try:
                target.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
            log.append({"killed": kind, "step": steps_of(folder)})
            if kind == "trainer":
                process.wait()
                left += len(psutil.wait_procs(others, timeout=20)[1])
                process = started(folder, args)
            break
    if process.wait():
        raise SystemExit((folder / "log").read_text()[-3000:])
    return {"log": log, "processes left": left}


def substance(folder: Path) -> list[Any]:
    steps = Journal.read(folder / "run").steps
    return [(s.update, s.rewards, s.prompts, s.fingerprint) for s in steps]


def transcripts(folder: Path) -> dict[str, list[Any]]:
    """What was said in all rollouts, by file."""
    files = sorted((folder / "run" / "completions").glob("*.parquet"))
    return {file.name: [json.loads(row["transcript"]) for row in pq.read_table(file).to_pylist()] for file in files}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        calm, wild = Path(name) / "calm", Path(name) / "wild"
        seconds = {}
        for folder in (calm, wild):
            folder.mkdir()
        began = time.perf_counter()
        if started(calm, args).wait():
            raise SystemExit((calm / "log").read_text()[-3000:])
        seconds["undisturbed"] = time.perf_counter() - began
        began = time.perf_counter()
        found = disturbed(wild, args)
        seconds["disturbed"] = time.perf_counter() - began
        one, other = transcripts(calm), transcripts(wild)

        def conversations(folder: Path) -> list[list[Any]]:
            return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]

        known = {json.dumps(each[1:]) for each in conversations(calm)}
        answered = conversations(wild)
        strange = [each for each in answered if json.dumps(each[1:]) not in known]
        result = {
            "settings": settings(args),
            "kills": dict(Counter(entry["killed"] for entry in found["log"])),
            "the same journal": substance(calm) == substance(wild),
            "the same transcripts": one == other,
            "transcripts": sum(map(len, one.values())),
            "processes left": found["processes left"],
            "requests answered": len(answered),
            "answered by other weights": len(strange),
            "keys": len({key for key, *_ in answered}),
            "seconds": rounded(seconds),
            "log": found["log"],
        }
    write_result("agent_kills", result, args.results)


if __name__ == "__main__":
    main()
