"""Model cards: what a run's checkpoint is, what it is worth, and how to load it and to make it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from estune.charts.chart import Plot, Series
from estune.charts.picture import draw
from estune.charts.table import markdown
from estune.charts.words import amount
from estune.files import write_text
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord
from estune.journal.shares import is_share, wilson, with_interval
from estune.run.directory import RunDirectory
from estune.run.recipe import own_task, train_command
from estune.weights.locate import hub_name, is_copied
from estune.weights.tensors import PACKED

CARD = "README.md"
PICTURE = "learning-curve.svg"
POINTS = 200  # of a curve, about
MEASURED_SHARE = "share of prompts answered right, %"
_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
"""
_REBUILD = """\
Here is no checkpoint, but the journal that it is rebuilt from, over the base model:

```sh
estune pull {name} -o RUN
estune replay RUN --step {step} -o MODEL
```

or in memory, as `estune.load("RUN", step={step})`."""
_ROWS = (
    ("accuracy", "eval_accuracy"),
    ("reward", "eval_reward"),
    ("mean length, tokens", "eval_completions/mean_length"),
)


def write_cards(run: RunDirectory, problems: int) -> None:
    """Write a card with the learning curve into `best` and `final`, as far as they are there.

    Args:
        run: the directory of a run that ends.
        problems: in its held-out set.
    """
    journal = Journal.read(run.path)
    steps = {run.best: None if journal.best is None else journal.best.step, run.final: len(journal.steps)}
    for folder, step in steps.items():
        if step is not None and folder.is_dir():
            Card(journal, f"{run.path.resolve().name}/{folder.name}", step, problems).write(folder)


@dataclass(frozen=True)
class Card:
    """What a checkpoint of a run is.

    Args:
        journal: the run's.
        name: what the model is loaded by: its name on the hub, or a directory.
        step: after which the checkpoint was saved.
        problems: in the held-out set.
        dataset: the hub's name of what it was trained on.
        journal_only: no checkpoint is there, only the journal that it is rebuilt from.
    """

    journal: Journal
    name: str
    step: int
    problems: int
    dataset: str | None = None
    journal_only: bool = False

    def write(self, folder: Path) -> None:
        """Write the card and its picture into the checkpoint's directory."""
        if charts := _curves(self.journal, self.problems):
            draw(charts, folder / PICTURE)
        write_text(folder / CARD, self.text())

    def text(self) -> str:
        """Markdown, with the hub's metadata at its head."""
        journal = self.journal
        trained = "All weights of" if journal.settings.get("adapter") is None else "A low-rank adapter (LoRA) of"
        before = journal.evaluations[0] if journal.evaluations else None
        kept = [e for e in journal.evaluations if e.step <= self.step and e.step - 1 not in journal.undone]
        after = kept[-1] if kept else None
        parts = [
            f"---\n{_metadata(journal, self.name, after, self.dataset)}---",
            f"# {self.name}",
            f"{trained} {_base(journal)} fine-tuned on {journal.header.task} with Evolution Strategies "
            "([arXiv 2509.24372](https://arxiv.org/abs/2509.24372)) by estune.",
            *_training(journal, self.step),
        ]
        if _curves(journal, self.problems):
            parts.append(f"![Learning curve]({PICTURE})")
        if before is not None and after is not None:
            parts += ["## Evaluation", *_evaluation(journal, before, after, self.problems)]
        use = _REBUILD.format(name=self.name, step=self.step)
        parts += [
            "## Use",
            use if self.journal_only else f"```python\n{_USE.format(name=self.name)}```",
            "## Make it again",
            *_again(journal, self.step),
        ]
        return "\n\n".join(parts) + "\n"


def _metadata(journal: Journal, name: str, after: EvaluationRecord | None, dataset: str | None) -> str:
    """The head, as YAML. The hub shows what was evaluated."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset or journal.header.task,
            dataset_name=f"{journal.header.task}, held out",
            metric_type=what,
            metric_name=f"held-out {what}",
            metric_value=after.metrics[key],
        )
        for what, key in _ROWS[:2]
        if after is not None and math.isfinite(after.metrics.get(key, math.nan))
    ]
    data = ModelCardData(
        base_model=_on_hub(journal.header.model),
        datasets=dataset,
        library_name="transformers" if journal.settings.get("adapter") is None else "peft",
        pipeline_tag="text-generation",
        tags=["estune", "evolution-strategies"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"{data.to_yaml()}\n"


def _on_hub(model: str) -> str | None:
    """A model's name on the hub, if it is there."""
    local = is_copied(model) or Path(model).is_absolute() or Path(model).exists()
    return None if local else hub_name(model)[0]


def _base(journal: Journal) -> str:
    model = journal.header.model
    found = _on_hub(model)
    return f"[{found}](https://huggingface.co/{found})" if found else f"`{Path(model).name}`"


def _training(journal: Journal, step: int) -> list[str]:
    count = len(journal.steps)
    if not journal.steps:
        return ["No step was taken: these are the base model's weights."]
    first = journal.steps[0]
    rewards = [key.split("/")[1] for key in first.metrics if key.startswith("rewards/") and key.endswith("/mean")]
    settings = journal.settings
    graded = f"Rewards: {', '.join(rewards)}. " if rewards else ""
    return [
        f"{amount(count, 'steps')} of {amount(len(first.of_members), 'members')} on "
        f"{amount(len(first.prompts), 'prompts')}, sigma {first.sigma:g}, learning rate "
        f"{first.learning_rate:g}, seed {settings.get('seed')}, at most "
        f"{settings.get('max_new_tokens')} tokens a completion, temperature {settings.get('temperature')}. "
        f"{graded}This is the checkpoint after step {step}{'.' if step else ': the base model itself.'}"
    ]


def _evaluation(journal: Journal, before: EvaluationRecord, after: EvaluationRecord, problems: int) -> list[str]:
    share = is_share(journal, "eval_accuracy") and problems > 0
    shown = [before] if after is before else [before, after]
    rows = [["held out", *map(_when, shown)]]
    for what, key in _ROWS:
        cells = [_cell(e.metrics, key, problems if share and what == "accuracy" else 0) for e in shown]
        if any(cells):
            rows.append([what, *cells])
    said = [markdown(rows)]
    remarks = []
    if share:
        remarks.append(f"On {problems} problems; in brackets Wilson's 95% interval.")
    if journal.best is not None and after.step == journal.best.step and len(journal.evaluations) > 1:
        remarks.append("Of the run's evaluations this one is the best: on other problems expect somewhat less.")
    header = journal.header
    if header.save_dtype == PACKED:
        remarks.append(
            f"The layers' matrices are stored as integers of {header.group_size} neighbours to a scale, as they were "
            "trained (compressed-tensors, pack-quantized)."
        )
    elif header.save_dtype != header.live_dtype:
        remarks.append(
            f"What was evaluated are {header.live_dtype} weights; they are stored here as {header.save_dtype}."
        )
    return [*said, " ".join(remarks)] if remarks else said


def _when(evaluation: EvaluationRecord) -> str:
    return f"after step {evaluation.step}" if evaluation.step else "before"


def _cell(metrics: Mapping[str, float], key: str, problems: int) -> str:
    """A figure; of a share in so many problems with its interval."""
    if key not in metrics:
        return ""
    if not problems:
        return f"{metrics[key]:.4g}"
    return with_interval(metrics[key], wilson(metrics[key], problems), True)


def _again(journal: Journal, step: int) -> list[str]:
    replayed = (
        "The base model and the run's `journal.jsonl` are enough to rebuild these weights to the same bits, without "
        f"training: `estune replay RUN --step {step} -o DIR`."
    )
    if own_task(journal):
        return [f"Its task, {journal.header.task}, is the author's own. {replayed}"]
    command = train_command(journal, f"{journal.path.parent.resolve().name}-again")
    return [f"```sh\n{command}\n```", replayed]


def _curves(journal: Journal, problems: int) -> list[Plot]:
    """Training reward and held-out accuracy by steps, as far as there are any; a share with its interval."""
    every = max(1, len(journal.steps) // POINTS)
    trained = [(r.step + 1.0, r.metrics.get("reward", math.nan)) for r in journal.steps[every - 1 :: every]]
    found = []
    for title, key, points in (
        ("Training reward", "", trained),
        ("Held-out accuracy", "eval_accuracy", _held_out(journal, "eval_accuracy")),
    ):
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        if finite:
            x = [at for at, _ in finite]
            series = [Series(title, x, [y for _, y in finite], "dots" if key else "line")]
            percent = bool(key) and is_share(journal, key)
            if percent and problems:
                ends = [wilson(y, problems) for _, y in finite]
                series.append(Series("95% interval", x, [b for _, b in ends], "whiskers", [a for a, _ in ends]))
            measured = MEASURED_SHARE if percent else title.lower()
            found.append(Plot(title, title, series, measured, percent=percent, from_zero=percent, buttons=False))
    return found


def _held_out(journal: Journal, key: str) -> Sequence[tuple[float, float]]:
    return [(float(e.step), e.metrics.get(key, math.nan)) for e in journal.evaluations]
