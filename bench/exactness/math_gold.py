"""Is the math grader fair to gold answers? Each one, as a model would write it, must be right, and its neighbour wrong.

Reads every `*.jsonl` of a folder, rows with `problem` and `answer`. For each set: answers that are not right when given
themselves; answers for which their neighbour's is right too (most of these are equal: look at them); and how many are
equal to themselves as text only, which `math-verify` alone does not see.
"""

import json
import time
from pathlib import Path
from typing import Any

from bench.common import options, settings, write_result

from estune.rewards.math import is_right
from estune.tasks.math import gold_answers


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("folder", type=Path, help="folder of .jsonl files")
    arguments = parser.parse_args()
    figures = {path.stem: measure(path) for path in sorted(arguments.folder.glob("*.jsonl"))}
    print(f"{'set':<16}{'rows':>6}{'itself':>8}{'only as text':>14}{'neighbour':>11}{'seconds':>9}")
    for name, found in figures.items():
        print(
            f"{name:<16}{found['rows']:>6}{found['itself_right']:>8}{found['needs_text']:>14}"
            f"{found['neighbour_right']:>11}{found['seconds']:>9.1f}"
        )
    write_result("math_gold", {"settings": settings(arguments), "sets": figures}, arguments.results)


def measure(path: Path) -> dict[str, Any]:
    """Counts, and the rows that stand out."""
    golds = [gold_answers(json.loads(line)["answer"]) for line in path.read_text().splitlines()]
    start = time.perf_counter()
    wrong = [i for i, gold in enumerate(golds) if not all(is_right(boxed(each), gold) for each in gold)]
    pairs = [(i, (i + 1) % len(golds)) for i in range(len(golds))]
    fooled = [(i, j) for i, j in pairs if any(is_right(boxed(each), golds[i]) for each in golds[j])]
    seconds = time.perf_counter() - start
    as_text = [gold for gold in golds if not all(verified(each) for each in gold)]
    return {
        "rows": len(golds),
        "itself_right": len(golds) - len(wrong),
        "itself_wrong": [{"row": i + 1, "gold": golds[i]} for i in wrong],
        "needs_text": len(as_text),
        "needs_text_answers": as_text,
        "neighbour_right": len(fooled),
        "neighbour_right_pairs": [{"row": i + 1, "gold": golds[i], "neighbour": golds[j]} for i, j in fooled],
        "seconds": round(seconds, 2),
    }


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def verified(answer: str) -> bool:
    """Whether `math-verify` alone finds an answer equal to itself."""
    from math_verify import parse, verify

    text = boxed(answer)
    return bool(verify(parse(text, parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None))


if __name__ == "__main__":
    main()
