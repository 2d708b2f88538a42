"""Draw a run's learning curve from its `metrics.jsonl`.

    python -m bench.plot_run runs/NAME -o docs/images/learning-curve.png

Left, the reward on the step's training prompts: the population's mean, and the band from its worst member to its best.
Right, the accuracy on the held-out set of the weights themselves, unperturbed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from bench.plots import GREY, tidy
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

REWARD, ACCURACY = "#2f6db3", "#c4562b"


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of steps, and those of evaluations; the later one where a step was taken twice."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = {r["step"]: r for r in records if "reward" in r}
    evaluations = {r["step"]: r for r in records if "eval_accuracy" in r}
    return list(steps.values()), list(evaluations.values())


def draw_reward(axes: Axes, steps: list[dict[str, Any]]) -> None:
    x = [r["step"] for r in steps]
    low, high = [r["reward_min"] for r in steps], [r["reward_max"] for r in steps]
    axes.fill_between(x, low, high, color=REWARD, alpha=0.18, linewidth=0, label="worst to best member")
    axes.plot(x, [r["reward"] for r in steps], color=REWARD, linewidth=1.8, label="population mean")
    axes.set_title("training reward")
    axes.legend(frameon=False, loc="lower right")
    axes.set_ylim(bottom=0)


def draw_accuracy(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    x, y = [r["step"] for r in evaluations], [r["eval_accuracy"] for r in evaluations]
    axes.plot(x, y, color=ACCURACY, linewidth=1.8, marker="o", markersize=4.5)
    axes.set_title("held-out accuracy")
    axes.set_ylim(0, max(0.05, min(1.0, max(y) * 1.2)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for i, offset in ((0, (-2, 9)), (len(x) - 1, (-4, 9))):
        axes.annotate(
            f"{y[i]:.0%}",
            (x[i], y[i]),
            xytext=offset,
            textcoords="offset points",
            color=ACCURACY,
            fontweight="bold",
            ha="left" if i == 0 else "right",
        )


def draw(run: Path, output: Path) -> None:
    steps, evaluations = read_metrics(run)
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), dpi=200, layout="constrained")
    draw_reward(left, steps)
    draw_accuracy(right, evaluations)
    for axes in (left, right):
        axes.set_xlabel("step", color=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        tidy(axes)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a run's learning curve.")
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("-o", "--output", type=Path, default=Path("learning-curve.png"))
    arguments = parser.parse_args()
    draw(arguments.run, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
