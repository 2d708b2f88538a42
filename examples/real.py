"""Train a real language model and show what it answered before and answers now: `make real` runs this.

python examples/real.py [SETTING=VALUE ...]

The model is SmolLM2-135M-Instruct, which learns to use a calculator; the settings are those of examples/calculator.yaml.
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from estune import Trainer
from estune.config import load
from estune.errors import printable

SHOWN = 12

config = load(Path(__file__).parent / "calculator.yaml", sys.argv[1:])
summary = Trainer(config).train()

# Each evaluation's completions are a table, with the held-out prompts in the same order.
steps = (summary.before["step"], summary.after["step"])
tables = [pq.read_table(summary.run / "completions" / f"evaluation-{step:05d}.parquet").to_pylist() for step in steps]
shown = Table(*("prompt", *(f"after step {step}" for step in steps)), title="held-out prompts", title_justify="left")
for before, after in list(zip(*tables, strict=True))[:SHOWN]:
    question = before["prompt"].rpartition("user: ")[2]  # the others show how it is done
    shown.add_row(*map(printable, (question, before["completion"], after["completion"])))
console = Console()
console.print(shown)
for what, key in (
    ("the answer is right", "eval_accuracy"),
    ("tokens", "eval_completions/mean_length"),
):
    console.print(f"{what}: {summary.before[key]:.3g} -> {summary.after[key]:.3g}")
