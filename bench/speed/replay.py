"""What a journal costs to keep and to replay: bytes, time against the kernel alone, and memory for a large model.

    python -m bench.speed.replay [--size 100M] [--steps 4] [--members 30] [--large 2.0] [--repeats 3]

- **Bytes**: the compact form of 1,000 steps of `--members` members, whose rewards and metrics all are numbers of full
  length, which is the worst case; as many metrics as training logs, and 16 or 200 prompts a step.
- **Time**: `estune replay` of `--steps` steps over a random model of `--size`, all in all (reading, hashing the base,
  writing, fingerprint), in turns with the update kernel alone doing the same number of normals on as many threads over
  an array in memory. The kernel's time grows with the steps, all else does not: more steps bring the ratio nearer to
  1. The journal is verified as well, whose time is told beside.
- **Memory**: peak of replaying one step of two members over a synthetic checkpoint of `--large` billion bfloat16
  weights in shards of 1 GB, all that is resident, interpreter and libraries included (Linux). Its files need four
  bytes of disk a weight; 0 leaves this out.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from bench.common import in_turns, options, settings, write_result
from bench.memory.peak import peak_memory

from estune.children import cores
from estune.es.evolution import EvolutionStrategy
from estune.journal import compact
from estune.journal.journal import Journal
from estune.journal.records import Header, StepRecord
from estune.journal.replay import replay
from estune.journal.verify import verify
from estune.noise import cpu
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import EMBEDDED
from estune.weights.policies import Rule
from estune.weights.rebuild import Steps

SHARD = 500_000_000  # weights
BLOCK = 1 << 20  # elements that the kernel alone works on at a time, as replay does
WIDTH = 4096
METRICS = 20


def write_journal(
    run: Path, base: Checkpoint, steps: int, members: int, *, prompts: int = 16, known: bool = True
) -> Journal:
    """The journal of a run over a base; `known`: with the fingerprints that its steps give."""
    chance = random.Random(0)
    dtype = base.type_of(base.tensors) or "float32"
    strategy = EvolutionStrategy(population=members, sigma=0.001, steps=steps)
    rewards = [[chance.random() for _ in range(members)] for _ in range(steps)]
    updates = [strategy.tell(each) for each in rewards]
    found = [f"{chance.getrandbits(64):016x}" for _ in range(steps + 1)]
    if known:
        found = Steps(Rule("copy", "nearest", "iid", dtype), updates).fingerprints(base, base.tensors)
    header = Header(
        model=str(base.path),
        base_hash=base.content_hash(),
        policy="copy",
        rounding="nearest",
        noise="iid",
        dtype=dtype,
        live_dtype=dtype,
        tensors={name: [] for name in base.tensors},
        fingerprint=found[0],
        task="",
        data_hash="",
        config={"seed": 0},
        packages={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    run.mkdir()
    journal = Journal.create(run, header)
    for update, each, fingerprint in zip(updates, rewards, found[1:], strict=True):
        metrics = {f"some/metric/{i}": chance.random() for i in range(METRICS)}
        rows = [chance.randrange(8000) for _ in range(prompts)]
        journal.append_step(StepRecord(update, 0.0005, [*each], rows, fingerprint, metrics))
    journal.close()
    return journal


def sizes(folder: Path, members: int) -> dict[str, int]:
    """Bytes of 1,000 steps, in either form, with few and with many prompts."""
    found = {}
    base = Checkpoint(EMBEDDED["tiny"])
    for prompts in (16, 200):
        journal = write_journal(folder / f"long-{prompts}", base, 1000, members, prompts=prompts, known=False)
        found[f"journal.jsonl, {prompts} prompts"] = sum(map(len, journal.texts()))
        found[f"compact form, {prompts} prompts"] = len(compact.pack(journal.texts()))
    return found


def kernel(elements: int, steps: Steps, threads: ThreadPoolExecutor) -> None:
    """The update kernel alone, on as many normals as replaying takes."""
    weights = [np.zeros(BLOCK, np.float32) for _ in range(cores())]

    def work(lane: int) -> None:
        for start in range(lane * BLOCK, elements, len(weights) * BLOCK):
            piece = weights[lane][: min(BLOCK, elements - start)]
            for t in steps._terms:
                assert t is not None
                cpu.update(piece, t.seeds, t.coefficients, 1, start, t.decay)

    list(threads.map(work, range(len(weights))))


def speed(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of replaying, of verifying and of the kernel alone."""
    from bench.models import random_model

    random_model(args.size).save_pretrained(folder / "model")
    base = Checkpoint(folder / "model")
    elements = sum(t.elements for t in base.tensors.values())
    journal = write_journal(folder / "run", base, args.steps, args.members)
    steps = Steps(journal.header.rule, [r.update for r in journal.steps])

    def replayed() -> None:
        replay(folder / "run", folder / "out")
        shutil.rmtree(folder / "out")

    with ThreadPoolExecutor(cores()) as threads:
        work = {
            "kernel": lambda: kernel(elements, steps, threads),
            "replay": replayed,
            "verify": lambda: verify(folder / "run"),
        }
        seconds = {name: float(np.median(times)) for name, times in in_turns(work, args.repeats, warm_up=1).items()}
    normals = elements * args.steps * args.members
    return {
        "parameters": elements,
        "seconds": seconds,
        "million normals a second, kernel": normals / seconds["kernel"] / 1e6,
        "replay / kernel": seconds["replay"] / seconds["kernel"],
        "verify / kernel": seconds["verify"] / seconds["kernel"],
    }


def write_large(folder: Path, weights: int) -> Checkpoint:
    """A checkpoint of so many bfloat16 weights, all 0, in shards: as large as a real one, and quick to make."""
    folder.mkdir()
    shutil.copy(EMBEDDED["tiny"] / "config.json", folder)
    weight_map = {}
    for number, first in enumerate(range(0, weights, SHARD)):
        rows = min(SHARD, weights - first) // WIDTH // 2
        file = folder / f"model-{number}.safetensors"
        header = {}
        for i in range(2):
            name = f"model.layers.{number}.tensor_{i}.weight"
            ends = [2 * rows * WIDTH * i, 2 * rows * WIDTH * (i + 1)]
            header[name] = {"dtype": "BF16", "shape": [rows, WIDTH], "data_offsets": ends}
            weight_map[name] = file.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + 4 * rows * WIDTH)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Checkpoint(folder)


def memory(folder: Path, billions: float) -> dict[str, float]:
    """Peak of a process that replays, and its seconds."""
    base = write_large(folder / "large", round(billions * 1e9))
    write_journal(folder / "run-large", base, 1, 2)
    command = [sys.executable, "-m", "bench.speed.replay", "--replay", str(folder / "run-large")]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        "weights, billions": billions,
        "checkpoint, MB": sum(t.size for t in base.tensors.values()) / 1e6,
        "peak, MB": float(done.stdout.splitlines()[-1]),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = options(__doc__)
    parser.add_argument("--size", default="100M")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--members", type=int, default=30)
    parser.add_argument("--large", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--replay", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.replay is not None:
        replay(args.replay, args.replay / "out")
        print(peak_memory())
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {"bytes of 1,000 steps": sizes(folder, args.members), "speed": speed(folder, args)}
        if args.large:
            result["memory"] = memory(folder, args.large)
    write_result("replay", {"settings": settings(args), **result}, args.results)


if __name__ == "__main__":
    main()
