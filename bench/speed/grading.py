"""Completions graded a second, in this process and in graders, and the share of a step that grading takes.

    python -m bench.speed.grading [--completions 400] [--steps 3]

- `countdown`: both of the paper's rewards, called once per batch in this process, as training does.
- `countdown, isolated`: the answer's reward, one completion a call, in 1 and 2 graders: what isolation costs.
- `math, isolated`: `math-verify` the same way, on answers as models give them (where it is installed).
- `code, isolated`: programs in the sandbox, with one test each (where namespaces are allowed).

Graders are started before the clock, and rates are of the median batch. The share of a step is what a real run of the
embedded model reports: seconds in which its main thread grades, while members generate, over the step's time.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.common import medians, options, read_lines, rounded, settings, write_result

from estune.completion import Completion
from estune.config import load
from estune.errors import EstuneError
from estune.grading.grading import Grading
from estune.grading.isolation import isolated
from estune.grading.sandbox import run_code
from estune.rewards.code import unit_tests
from estune.rewards.countdown import answer_reward, format_reward
from estune.rewards.math import math_reward
from estune.run.trainer import Trainer

Work = tuple[list[dict[str, Any]], list[Completion]]


@isolated
def isolated_answer(**columns: Any) -> list[float | None]:
    return answer_reward(**columns)


@isolated
def isolated_math(**columns: Any) -> list[float | None]:
    return math_reward(**columns)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--completions", type=int, default=400, metavar="N", help="in a batch")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="of the run whose share is taken")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    size, repeats = arguments.completions, arguments.repeats
    figures: dict[str, Any] = {"countdown": rate([answer_reward, format_reward], countdown(size), None, repeats)}
    for processes in (1, 2):
        row = figures[f"{processes} graders"] = {
            "countdown, isolated": rate([isolated_answer], countdown(size), processes, repeats)
        }
        if find_spec("math_verify"):
            row["math, isolated"] = rate([isolated_math], mathematics(size), processes, repeats)
        if sandboxes():
            row["code, isolated"] = rate([unit_tests], code(max(1, size // 40)), processes, repeats)
    result = {
        "settings": settings(arguments),
        "completions_per_second": rounded(figures),
        "embedded_step": rounded(share(arguments.steps)),
    }
    write_result("grading", result, arguments.results)


def rate(functions: Sequence[Callable[..., Any]], work: Work, processes: int | None, repeats: int) -> float:
    """Completions a second; all of them must be right, or something else than grading was timed."""
    with Grading(functions, processes=processes) as grading:
        grades = grading.grade(*work)
        assert grades.mean is not None
        assert set(grades.scores[next(iter(grades.scores))]) == {1.0}, grades
        seconds = medians({"grade": lambda: grading.grade(*work)}, repeats)["grade"]
    return len(work[0]) / seconds


def countdown(size: int) -> Work:
    rng = random.Random(0)
    rows, texts = [], []
    for _ in range(size):
        a, b, c = (rng.randint(1, 50) for _ in range(3))
        rows.append({"prompt": "p <think>", "numbers": [a, b, c], "target": a + b * c})
        texts.append(f"{a} + {b} is {a + b}, " * 8 + f"so</think>\n<answer>{b}*{c} + {a}</answer>")
    return rows, [Completion(text, [], True) for text in texts]


def mathematics(size: int) -> Work:
    r"""Answers that are right but written differently, so that none is equal as text."""
    rng = random.Random(0)
    shapes: list[Callable[[int, int], tuple[str, str]]] = [
        lambda a, b: (f"\\frac{{{a}}}{{{b}}}", f"{2 * a}/{2 * b}"),
        lambda a, b: (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}"),
        lambda a, b: (f"x^2+{a}x+{b}", f"{b}+{a}x+x^2"),
        lambda a, b: (f"({a}, {b}]", f"\\left({a}.0,{b}\\right]"),
        lambda a, b: (str(a * b), f"{a} \\times {b}"),
    ]
    pairs = [shapes[i % len(shapes)](rng.randint(2, 99), rng.randint(2, 99)) for i in range(size)]
    texts = [f"We find {answer} by hand. The answer is \\boxed{{{answer}}}." for _, answer in pairs]
    return [{"prompt": "p", "answer": gold} for gold, _ in pairs], [Completion(text, [], True) for text in texts]


def code(size: int) -> Work:
    rows = [{"prompt": "p", "tests": f"assert f({i}) == {i * i}"} for i in range(size)]
    return rows, [Completion("```python\ndef f(x):\n    return x * x\n```", [], True)] * size


def sandboxes() -> bool:
    try:
        return run_code("pass").status == "passed"
    except EstuneError:
        return False


def share(steps: int) -> dict[str, float]:
    """Of steps of the embedded model; the first, which compiles, is left out."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config = load(None, [f"steps={steps + 1}", "eval_steps=0", f"output_dir={run}", "report_to=none"])
        Trainer(config, monitors=[]).train()
        lines = read_lines(run / "journal.jsonl")
    found = [line["metrics"] for line in lines if "time/grade" in line.get("metrics", {})][1:]
    seconds = {key: statistics.median(metrics[key] for metrics in found) for key in ("time/grade", "step_time")}
    return {
        "completions": config.population * config.prompts_per_step,
        "grade_seconds": seconds["time/grade"],
        "step_seconds": seconds["step_time"],
        "share": seconds["time/grade"] / seconds["step_time"],
    }


if __name__ == "__main__":
    main()
