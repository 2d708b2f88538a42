"""Runs as training would have left them, and the pages that are made of them, read back."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from estune.config import Config
from estune.es.strategy import Member
from estune.es.update import Update
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord, Header, StepRecord
from estune.run.graded import write_completions
from estune.study.report import write_report
from estune.weights.checkpoint import Checkpoint

HOSTILE = "</pre></script><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>&amp;\x00\u202e"
Scores = Callable[[int], list[float]]  # of the prompts at a step
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Parsed(HTMLParser):
    """Elements with their attributes and text; fails where tags are not properly nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = {key: value or "" for key, value in attrs}
        if tag in VOID:
            self.elements.append((tag, attributes, ""))
        else:
            self.open.append((tag, attributes, []))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        name, attributes, text = self.open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        self.elements.append((name, attributes, "".join(text)))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag: str, **wanted: str) -> list[str]:
        return [
            text for name, a, text in self.elements if name == tag and all(a.get(k) == v for k, v in wanted.items())
        ]

    def chart(self, name: str) -> dict[str, dict[float, str]]:
        """Values of a chart by series and step, as the script shows them."""
        for tag, attributes, text in self.elements:
            if tag == "figure" and attributes.get("data-chart") == name:
                data = json.loads(text[text.index('{"span"') :])
                return {
                    s["name"]: {x: t for x, t in zip(data["x"], s["text"], strict=True) if t} for s in data["series"]
                }
        raise AssertionError(f"no chart {name}")

    def kept(self) -> list[dict[str, Any]]:
        """All completions of each run, as the script finds them."""
        return [json.loads(text) for text in self.all("script", type="application/json") if '"answers"' in text]


def members(step: int, population: int, seed: int) -> list[float | None]:
    return [math.sin(7.3 * step + 1.7 * i + seed) * 0.2 + step / 50 for i in range(population - 1)] + [None]


def make_run(
    folder: Path,
    model: Path | str = "tiny",
    *,
    steps: int = 6,
    population: int = 5,
    trained_on: str = "countdown",
    ancestors: int = 0,
    more: dict[str, float] | None = None,
    scores: Scores | None = None,
    **settings: Any,
) -> Path:
    """A run as training would have left it, evaluated at every other step."""
    config = Config(**{"model": str(model), "steps": steps, "population": population, **settings})
    checkpoint = Checkpoint(Path(model)) if isinstance(model, Path) else None
    header = Header(
        model=str(model),
        base_hash=checkpoint.content_hash() if checkpoint else "0" * 32,
        policy="master",
        rounding="nearest",
        noise="iid",
        dtype="float32",
        live_dtype="float32",
        tensors={name: [] for name in checkpoint.tensors} if checkpoint else {},
        fingerprint="f" * 16,
        task=trained_on,
        data_hash="d" * 32,
        config=config.model_dump(mode="json"),
        packages={"estune": "9.9"},
        created="2026-01-01T00:00:00+00:00",
    )
    (folder / "completions").mkdir(parents=True)
    parent = None
    if ancestors:
        make_run(folder / "parent", model, steps=ancestors)
        parent = Journal.read(folder / "parent")
    journal = Journal.create(folder, header, parent)
    for step in range(steps + 1):
        if step % 2 == 0:
            evaluate(folder, journal, step, scores, **(more or {}))
        if step < steps:
            rewards = members(step, population, config.seed)
            update = Update(step, tuple(Member(i, 1) for i in range(population)), (0.0,) * population, sigma=0.1)
            known = [r for r in rewards if r is not None]
            times = {"step_time": 2.0, "time/perturb": 0.25, "time/generate": 1.0, "time/grade": 0.125}
            metrics = {
                "step": step + 1,
                "reward": statistics.fmean(known),
                "completions/mean_length": 10.0 + step,
                "num_tokens": 100.0 * (step + 1),
                **times,
                "time/update": 0.125,
            }
            journal.append_step(StepRecord(update, 0.1, rewards, [0, 1], f"{step:016x}", metrics))
    journal.append_end("finished")
    journal.close()
    return folder


def evaluate(folder: Path, journal: Journal, step: int, scored: Scores | None = None, **more: float) -> None:
    """Of eight prompts, 0 is right at the start only, 1 always, and the others one after the other."""
    scores = [float(i == 1 or (i == 0 and step == 0) or (1 < i <= step)) for i in range(8)]
    scores = scored(step) if scored else scores
    records = [
        {"prompt": f"p{i} {HOSTILE}", "completion": f"c{i} at {step} {HOSTILE}", "reward": s + 0.1, "rewards/right": s}
        for i, s in enumerate(scores)
    ]
    write_completions(folder / "completions" / f"evaluation-{step:05d}.parquet", records)
    mean = statistics.fmean(scores)
    metrics = {"step": step, "eval_reward": mean + 0.1, "eval_accuracy": mean, **{k: v + step for k, v in more.items()}}
    journal.append_evaluation(EvaluationRecord(step, metrics))


def report(*runs: Path) -> tuple[str, Parsed]:
    output = runs[0].parent / "report.html"
    write_report(runs, output)
    page = output.read_text(encoding="utf-8")
    return page, Parsed(page)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """The journal, read without estune."""
    records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == kind]
