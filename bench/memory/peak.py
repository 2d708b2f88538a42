"""Peak memory of training with the `copy` policy above plain inference, and of `estune replay`.

    python -m bench.memory.peak

Builds a random Qwen2 checkpoint of a few hundred MB in a temporary directory and starts one process for each figure,
so that each has a peak of its own: all that is resident, interpreter and libraries included. Linux only, as it reads
`VmHWM` (`ru_maxrss` would start from the parent's peak).

- `plain`: generate on a few prompts. Counted from when the model is loaded: loading holds, for a moment, the pages of
  its file as well, which would hide what training adds.
- `kernels`: the same with the compiled kernels loaded and run on a few elements. What this adds is Numba and LLVM, the
  same for a model of any size.
- `copy`: the same, with the weights perturbed before and an update applied and fingerprinted after.
  To be compared with the weights plus 64 MB above plain inference.
- `replay`: rebuild a checkpoint from base and journal. Bound: twice the largest tensor plus 300 MB, in all. Measured on
  the model with a few steps, and with a thousand on another one of many small tensors: what is kept for each step shows
  there as well as on the large model, where a thousand steps would take an hour.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.common import options, write_result

from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import EMBEDDED

MB = 1e6
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 16, 8
MEMBERS, STEPS = 4, 3
LONG_MEMBERS, LONG_STEPS = 2, 1000
LONG_HIDDEN, LONG_LAYERS, LONG_VOCABULARY = 128, 4, 1024  # a million elements in 50 tensors


def build_checkpoint(folder: Path, hidden: int, layers: int, vocabulary: int, tokenizer: Path) -> None:
    """A random Qwen2 model, with the files of somebody's tokenizer beside it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / file.name)


def infer(part: str, model: str) -> None:
    """Generate on a few prompts as often as there are members; what else is done depends on the part."""
    import torch

    from estune.completion import Sampling
    from estune.engines.transformers import TransformersEngine

    torch.set_num_threads(1)
    engine = TransformersEngine(model, dtype="float32", device="cpu")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now, see proc(5)
    prompts = [[10 + i + j for j in range(PROMPT_TOKENS)] for i in range(PROMPTS)]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    if part != "copy":
        if part == "kernels":
            load_kernels()
        for _ in range(MEMBERS):
            engine.generate(prompts, sampling)
        return
    from estune.es.evolution import EvolutionStrategy
    from estune.weights.parameters import trained_parameters
    from estune.weights.weights import Weights

    weights = Weights(trained_parameters(engine.model, Checkpoint(Path(model)).tensors), policy="copy")
    strategy = EvolutionStrategy(population=MEMBERS, sigma=0.01)
    for member in strategy.ask():
        weights.perturb(member, strategy.sigma)
        engine.generate(prompts, sampling)
    weights.apply(strategy.tell([float(i) for i in range(MEMBERS)]))
    weights.fingerprint()


def load_kernels() -> None:
    """Compile the kernels, or load them compiled."""
    import numpy as np

    from estune.noise import cpu, cpu_sums

    few = np.zeros(8, np.float32)
    cpu.perturb(few, few, 0, 0, 0, 1.0)
    cpu.update(few, np.zeros(1, np.uint64), np.zeros(1, np.float32), 0, 0)
    cpu_sums.fingerprint(few, 0, 0)


def write_journal(model: str, run: str, members: int, steps: int) -> None:
    """A journal of some steps over the model, as a run would have written it."""
    from estune.engines.loading import load_model
    from estune.es.evolution import EvolutionStrategy
    from estune.journal.journal import Journal
    from estune.journal.records import Header, StepRecord
    from estune.weights.device import pick_device
    from estune.weights.parameters import trained_parameters
    from estune.weights.weights import Weights

    base = Checkpoint(Path(model))
    loaded = load_model(base.path, "float32", pick_device("cpu"))
    weights = Weights(trained_parameters(loaded, base.tensors))
    header = Header(
        model=model,
        base_hash=base.content_hash(),
        policy="master",
        rounding="nearest",
        noise="iid",
        dtype=weights.rule.dtype,
        live_dtype="float32",
        tensors={p.name: list(p.aliases) for p in weights.parameters},
        fingerprint=weights.fingerprint(),
        task="",
        data_hash="",
        config={},
        packages={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    Path(run).mkdir()
    journal = Journal.create(Path(run), header)
    strategy = EvolutionStrategy(population=members, sigma=0.01)
    for _ in range(steps):
        rewards: list[float | None] = [float(i) for i in range(members)]
        rate = strategy.learning_rate
        update = strategy.tell(rewards)
        weights.apply(update)
        journal.append_step(StepRecord(update, rate, rewards, [], weights.fingerprint()))
    journal.close()


def in_process(*arguments: str) -> float:
    """Peak resident memory, in MB, of this script run for one part in a process of its own."""
    command = [sys.executable, "-m", "bench.memory.peak", "--part", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def run_part(part: str, *arguments: str) -> None:
    match part:
        case "plain" | "kernels" | "copy":
            infer(part, arguments[0])
        case "replay":
            from estune.journal.replay import replay

            replay(Path(arguments[0]), Path(arguments[1]))
        case "build":
            hidden, layers, vocabulary = map(int, arguments[1:4])
            build_checkpoint(Path(arguments[0]), hidden, layers, vocabulary, Path(arguments[4]))
        case "journal":
            write_journal(arguments[0], arguments[1], int(arguments[2]), int(arguments[3]))
    print(peak_memory())


def peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / MB


def measure(folder: Path, hidden: int, layers: int, tokenizer: Path) -> dict[str, Any]:
    model = folder / "model"
    in_process("build", str(model), str(hidden), str(layers), "32768", str(tokenizer))
    base = Checkpoint(model)
    sizes = [tensor.size / MB for tensor in base.tensors.values()]
    in_process("copy", str(model))  # so that the compiled kernels are at hand in what is measured
    plain, kernels, copy = (in_process(part, str(model)) for part in ("plain", "kernels", "copy"))
    replayed = replay_peak(model, folder / "run", MEMBERS, STEPS)
    small = folder / "small"
    shape = (str(n) for n in (LONG_HIDDEN, LONG_LAYERS, LONG_VOCABULARY))
    in_process("build", str(small), *shape, str(tokenizer))
    long_replayed = replay_peak(small, folder / "long", LONG_MEMBERS, LONG_STEPS)
    figures = {
        "weights": sum(sizes),
        "largest tensor": max(sizes),
        "plain inference, peak": plain,
        "plain inference with kernels loaded, peak": kernels,
        "copy policy, peak": copy,
        "copy policy, above plain inference": copy - plain,
        "copy policy, above plain inference with kernels loaded": copy - kernels,
        "weights plus 64 MB": sum(sizes) + 64,
        "replay, peak": replayed,
        "replay, bound": 2 * max(sizes) + 300,
        "replay of 1000 steps on a small model, peak": long_replayed,
    }
    return {"unit": "MB", "members": MEMBERS, "prompts": PROMPTS, **{key: round(v, 1) for key, v in figures.items()}}


def replay_peak(model: Path, run: Path, members: int, steps: int) -> float:
    in_process("journal", str(model), str(run), str(members), str(steps))
    return in_process("replay", str(run), str(run / "rebuilt"))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokenizer", type=Path, default=EMBEDDED["tiny"], help="directory of any tokenizer")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(*arguments.part)
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.hidden, arguments.layers, arguments.tokenizer)
    write_result("memory", figures, arguments.results)


if __name__ == "__main__":
    main()
