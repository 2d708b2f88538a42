"""The paper's tables in miniature: ES against reinforcement learning on models of three sizes and two architectures.

    python -m bench.study models        pretrain the small ones, minutes each, into runs/study/models
    python -m bench.study run           compare; goes on where it was cut off
    python -m bench.study page          docs/study.md from bench/results/study-*.jsonl

One set of ES settings for all models. The learning rate of RL is chosen for each model, on a seed of its own, by
accuracy on the evaluation set: which is in its favour. Every run may generate the same number of tokens, prompts not
counted. All are evaluated greedily by the same code, `estune.compare.measure`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import plots
from bench.common import RESULTS, machine

from estune.compare.plan import Plan, read_results
from estune.compare.report import NAMES, by_method, markdown, spread, table, trials_table
from estune.compare.run import compare
from estune.config import load

FOLDER = Path("runs/study")
PAGE = Path(__file__).parents[1] / "docs" / "study.md"
# The recipe of the embedded model, cut short: architecture, its sizes, and skill steps, horizon and learning rate.
MODELS: dict[str, tuple[str, dict[str, int], dict[str, float]]] = {
    "qwen2-0.36M": (
        "Qwen2",
        {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
         "num_key_value_heads": 1},
        {"steps": 900, "horizon": 1170, "noise_rise": 450, "learning_rate": 6e-3},
    ),
    "llama-0.67M": (
        "Llama",
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2},
        {"steps": 400, "horizon": 1040, "noise_rise": 400, "learning_rate": 5e-3},
    ),
}  # fmt: skip
EMBEDDED = "qwen2-0.87M"
ORDER = ("qwen2-0.36M", "llama-0.67M", EMBEDDED)
HABIT_STEPS, CHAT_ROWS = 200, 4
RATES = (3e-5, 1e-4, 3e-4)
BUDGET = 300_000
# Of an ES step; and tokens of a completion, about.
POPULATION, PROMPTS, TOKENS = 20, 20, 20.5


def pretrain(name: str, output: Path, skill: Path | None) -> None:
    """Make a model: the skill, or what a first phase's checkpoint has of it, then the habit of seldom using it."""
    import torch
    import transformers
    from recipes.tiny import tokenizer, train

    torch.set_num_threads(1)
    torch.manual_seed(0)
    architecture, sizes, schedule = MODELS[name]
    if skill is not None:
        words = transformers.AutoTokenizer.from_pretrained(skill)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(skill, dtype=torch.float32)
    else:
        words = tokenizer.build(0)
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(
            **sizes, vocab_size=len(words), max_position_embeddings=512, tie_word_embeddings=True,
            initializer_range=0.05, bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )  # fmt: skip
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
        phase: Any = replace(train.SKILL, chat_rows=CHAT_ROWS, chat_weight=0.05, **schedule)
        train.train(model, words, phase, 0, output.with_name(f"{output.name}-skill"))
    habit = replace(train.HABIT, steps=HABIT_STEPS, horizon=HABIT_STEPS, chat_rows=CHAT_ROWS)
    train.train(model, words, habit, 1, output)


def settings(model: str) -> list[str]:
    """The same for all models: those of the embedded one but for the population and the prompts of a step."""
    return [
        f"model={model}", "task.count=3", "task.numbers=1-12", "task.target=1-60", "task.train_size=8000",
        "task.eval_size=400", "task.seed=0", "max_new_tokens=40", "sigma=0.024", "learning_rate=0.024",
        f"population={POPULATION}", f"prompts_per_step={PROMPTS}",
    ]  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Compare on each model, and put what came of it into the results."""
    plan = Plan(
        methods=arguments.methods.split(","),
        budget=int(arguments.budget),
        seeds=list(range(arguments.seeds)),
        rates=[float(rate) for rate in arguments.rates.split(",")],
        batch=128,
    )
    for name in arguments.models.split(","):
        model = "tiny" if name == EMBEDDED else str(FOLDER / "models" / name)
        folder = FOLDER / f"{plan.budget}" / name
        compare(plan, load(None, settings(model)), folder, lambda r: print(json.dumps(r), flush=True))
        collect(name, plan.budget, arguments.results)


def collect(name: str, budget: int, results: Path) -> None:
    """Put what a model's runs came to so far into the results."""
    common = {"model": name, "budget": budget, "machine": machine()}
    lines = [json.dumps({**common, **result}) for result in read_results(FOLDER / f"{budget}" / name)]
    (results / f"study-{budget}-{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def page(results: Path, path: Path) -> None:
    """Write the page and its pictures from all results, leaving what is below its last heading as it is."""
    found = _read(results)
    parts = [_introduction(found)]
    for budget in sorted({r["budget"] for r in found}):
        of_budget = [r for r in found if r["budget"] == budget]
        parts.append(f"## {budget:,} tokens a run")
        image = path.parent / "images" / "study" / f"accuracy-{budget}.svg"
        _picture(of_budget, image)
        parts.append(f"![accuracy of each method on each model](images/study/{image.name})")
        parts.append(markdown(_overview(of_budget)))
        for name in ORDER:
            rows = [r for r in of_budget if r["model"] == name]
            if not rows:
                continue
            parts += [f"### {name}", markdown(table(rows))]
            if any(r["job"]["trial"] for r in rows):
                parts += ["Learning rates tried on a seed of their own:", markdown(trials_table(rows))]
    parts.append(_origin(found))
    conclusion = "## What held and what did not"
    old = path.read_text().partition(conclusion)[2] if path.is_file() else "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + f"\n\n{conclusion}{old}")


def _read(results: Path) -> list[dict[str, Any]]:
    lines = [line for file in sorted(results.glob("study-*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def _introduction(found: Sequence[Mapping[str, Any]]) -> str:
    return (
        "# A study in miniature\n\n<!-- By `python -m bench.study page`; the last section is kept. -->\n\n"
        f"One set of {(__doc__ or '').partition('One set of ')[2].strip()}\n\n"
        "The task is Countdown with three numbers. Each model has the skill and seldom uses it, by the\n"
        "[recipe](../recipes/tiny) of the embedded model, which for the others is cut short. Figures are means over\n"
        "seeds, with the standard deviation of the sample. [compare.md](compare.md) says what each column is."
    )


def _overview(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Accuracy of each method on each model: the paper's first table."""
    methods = [m for m in NAMES if any(r["job"]["method"] == m for r in found)]
    rows = []
    for name in ORDER:
        runs = by_method([r for r in found if r["model"] == name])
        if runs:
            cells = [spread([100 * r["accuracy"] for r in runs[m]], 1) if m in runs else "" for m in methods]
            rows.append([name, *cells])
    return [["accuracy %", *(NAMES[m] for m in methods)], *rows]


def _picture(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    groups: dict[str, dict[str, float]] = {}
    for name in ORDER:
        runs = by_method([r for r in found if r["model"] == name])
        if runs:
            groups[name] = {NAMES[m]: statistics.fmean(100 * r["accuracy"] for r in rs) for m, rs in runs.items()}
    figure, (axes,) = plots.panels(1, 1, 3.2, 6)
    plots.groups(axes, groups, "accuracy %")
    plots.save(figure, path)


def _origin(found: Sequence[Mapping[str, Any]]) -> str:
    m = found[0]["machine"]
    return (
        f"<sub>`python -m bench.study run`; {m['cpu']}, one thread; Python {m['python']}, estune {m['estune']}, torch "
        f"{m['torch']}, transformers {m['transformers']}</sub>"
    )


def main() -> None:
    """Do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("models", "run", "page"))
    parser.add_argument("--models", default=",".join(ORDER), help="of these")
    parser.add_argument("--methods", default="es,grpo,dr_grpo,dapo,rloo")
    parser.add_argument("--budget", type=float, default=BUDGET, help="generated tokens a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="RL learning rates to try")
    parser.add_argument(
        "--skill", action="store_true", help="models: only the second phase, from the first's checkpoint"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if arguments.what == "models":
        for name in arguments.models.split(","):
            if name in MODELS:
                output = FOLDER / "models" / name
                pretrain(name, output, output.with_name(f"{name}-skill") if arguments.skill else None)
    elif arguments.what == "run":
        run(arguments)
    else:
        page(arguments.results, arguments.output)


if __name__ == "__main__":
    main()
