"""The paper's tables in miniature: ES against reinforcement learning on models of three sizes and two architectures.

    python -m bench.study.compare models        pretrain the small ones, minutes each, into runs/study/models
    python -m bench.study.compare run           compare; goes on where it was cut off
    python -m bench.study.page          docs/study-tables.md from bench/results

One set of ES settings for all models and both tasks, chosen by `bench.study.sensitivity` on the largest of the models.
In the first two sections the learning rate of RL is chosen for each model and task, on a seed of its own, by reward
on the evaluation set: which is in its favour. Every run may generate the same number of tokens, prompts not counted.
All are evaluated greedily by the same code, `estune.study.compare.measure`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import RESULTS, machine

from estune.config import load
from estune.study.compare.plan import METHODS, Plan, read_results
from estune.study.compare.run import compare

FOLDER = Path("runs/study")
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
COUNTDOWN = ("qwen2-0.36M", "llama-0.67M", EMBEDDED)
CONCISENESS = f"{EMBEDDED}-conciseness"
WIDER = "-numbers-to-20"
"""Of an experiment with numbers up to 20, where the models were taught those up to 12: they have less of the skill that
they need, and to go further. With four numbers instead of three they never find an answer, and so nobody has anything
to learn from."""
WIDE = tuple(f"{model}{WIDER}" for model in (EMBEDDED, "qwen2-0.36M", "llama-0.67M"))
EXPERIMENTS = (*COUNTDOWN, CONCISENESS)
HABIT_STEPS, CHAT_ROWS = 200, 4
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
BUDGET = 200_000
# ES's settings.
SIZES = ("sigma=0.024", "learning_rate=0.012")
POPULATION, PROMPTS = 20, 20
STEP = (f"population={POPULATION}", f"prompts_per_step={PROMPTS}")


def pretrain(name: str, output: Path, skill: Path | None) -> None:
    """Make a model: the skill, or what a first phase's checkpoint has of it, then the habit of seldom using it."""
    import torch
    import transformers
    from recipes.tiny import tokenizer, train

    torch.set_num_threads(1)
    torch.manual_seed(0)
    schedule: Any
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


def model_and_task(experiment: str) -> list[str]:
    """Settings of an experiment; of ES the paper's noise alone."""
    name = experiment.removesuffix(WIDER)
    model = "tiny" if name in (EMBEDDED, CONCISENESS) else str(FOLDER / "models" / name)
    task = [
        "task.name=countdown", "task.count=3", "task.numbers=1-12", "task.target=1-60", "task.train_size=8000",
        "task.eval_size=400", "task.seed=0", "max_new_tokens=40",
    ]  # fmt: skip
    if name != experiment:
        task[2] = "task.numbers=1-20"
    if experiment == CONCISENESS:  # with the paper's reward: length alone, which a wrong answer can have too
        task = ["task.name=conciseness", "task.correct_weight=0", "task.length_weight=1", "max_new_tokens=64"]
    return [f"model={model}", "noise=iid", *task]


def run(arguments: argparse.Namespace) -> None:
    """Do each comparison, and put what came of it into the results."""
    plan = Plan(
        methods=arguments.methods.split(","),
        budget=int(arguments.budget),
        seeds=list(range(arguments.seeds)),
        rates=[float(rate) for rate in arguments.rates.split(",")],
        batch=128,
    )
    for name in arguments.experiments.split(","):
        folder = FOLDER / f"{plan.budget}" / name
        compare(
            plan, load(None, [*model_and_task(name), *SIZES, *STEP]), folder, lambda r: print(json.dumps(r), flush=True)
        )
        collect(name, arguments.results)


def collect(name: str, results: Path) -> None:
    """Put what an experiment's runs came to so far, at every budget, into the results."""
    with (results / f"study-{name}.jsonl").open("w") as file:
        for folder in sorted(FOLDER.glob(f"[0-9]*/{name}"), key=lambda folder: int(folder.parent.name)):
            common = {"experiment": name, "budget": int(folder.parent.name), "machine": machine()}
            file.writelines(f"{json.dumps({**common, **result})}\n" for result in read_results(folder))


def main() -> None:
    """Do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("models", "run"))
    parser.add_argument("--models", default=",".join(MODELS), help="of these")
    parser.add_argument(
        "--skill", action="store_true", help="models: only the second phase, from the first's checkpoint"
    )
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS), help="run: these")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budget", type=float, default=BUDGET, help="generated tokens a run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="RL learning rates to try")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments)
        return
    for name in arguments.models.split(","):
        output = FOLDER / "models" / name
        pretrain(name, output, output.with_name(f"{name}-skill") if arguments.skill else None)


if __name__ == "__main__":
    main()
