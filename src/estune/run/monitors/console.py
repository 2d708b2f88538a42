"""The run on screen: a live display on a terminal, a line per step elsewhere."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection

from rich import get_console
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from estune.charts.words import amount, duration
from estune.errors import printable, printable_lines
from estune.journal.shares import shown
from estune.run.monitors.base import Metrics, Monitor, Plan, Sample, Summary, Work
from estune.run.monitors.pace import Look, Stopwatch, outlook, too_long

log = logging.getLogger(__name__)

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 60  # points of a curve on screen
CONTENTS = {
    "best": "checkpoint of the best evaluation, which transformers loads",
    "final": "checkpoint after the last step",
    "journal.jsonl": "the run itself: `estune replay` rebuilds any step",
    "metrics.jsonl": "metrics of every step and evaluation",
    "tensorboard": "the same for TensorBoard",
    "completions": "completions, as parquet",
    "config.yaml": "all settings",
    "machine.json": "what it ran on",
}
BAR = 24  # characters of a bar
BEATS = 0.25  # seconds between two looks at what is under way
LINES = 15.0  # seconds between two lines of a file, at least, within what takes long
PROMPT_END = 600  # characters of a prompt shown, from its end


class ConsoleMonitor(Monitor):
    """Progress, reward and its spread, evaluation, time left and a sample completion.

    A thread of its own looks at what is under way: a display that moves, or a line now and then.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or get_console()  # the one that log messages go to: they appear above the display
        self._live: Live | None = None
        self._rewards: list[float] = []
        self._accuracies: list[tuple[int, float]] = []
        self._shares: Collection[str] = ()  # until the run says what it sets out to do
        self._last: Metrics = {}
        self._sample: Sample | None = None
        self._watch: Stopwatch | None = None  # until a run begins
        self._steps = 0  # of the run
        self._members = 0  # of the step, that have been graded
        self._foretold: bool | None = None  # what the run will take has been told; at most
        self._spoken = 0.0  # when the last line was written
        self._over = threading.Event()
        self._beats: threading.Thread | None = None

    def on_train_begin(self, plan: Plan) -> None:
        """Say what the run is, and start the display."""
        self._shares = plan.shares
        again = f", going on after step {plan.first_step}" if plan.first_step else ""
        self.console.print(
            f"[bold]{escape(printable(plan.task))}[/] with {escape(printable(plan.model))} "
            f"({plan.parameters:,} parameters): {amount(plan.steps, 'steps')} of "
            f"{amount(plan.population, 'members')} x {amount(plan.prompts_per_step, 'prompts')}, "
            f"sigma {plan.config['sigma']:g}, engine {plan.config['engine']}{again}\n"
            f"train {plan.train_size:,} problems, held out {plan.eval_size:,}; everything goes to {plan.run}",
            highlight=False,
            soft_wrap=not self.console.is_terminal,
        )
        self._steps = plan.steps
        self._watch = Stopwatch(plan)
        self._spoken = time.monotonic()
        self._over.clear()
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._render, auto_refresh=False)
            self._live.start(refresh=True)
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def on_generate_begin(self, work: Work) -> None:
        """Follow it."""
        self._members = 0
        if self._watch is not None:
            self._watch.begin(work)

    def on_member_end(self, done: int, population: int) -> None:
        """Count it."""
        self._members = done

    def on_step_end(self, metrics: Metrics, sample: Sample) -> None:
        """Take in a step."""
        self._rewards.append(metrics["reward"])
        self._last = metrics
        self._sample = sample
        left = None
        if self._watch is not None:
            self._watch.step_done(metrics)
            left = self._watch.run_left
            self._foretell(left)
        if self._live is None:
            self._print(
                f"step {metrics['step']:>4}/{self._steps}  reward {metrics['reward']:.4f} ± {metrics['reward_std']:.4f}"
                f"  length {metrics['completions/mean_length']:.1f}  {metrics['step_time']:.2f} s"
                f"  {metrics['tokens_per_second']:,.0f} tokens/s" + (f"  {duration(left)} left" if left else "")
            )

    def on_evaluate(self, metrics: Metrics, sample: Sample) -> None:
        """Take in an evaluation."""
        self._accuracies.append((int(metrics["step"]), metrics["eval_accuracy"]))
        self._sample = sample
        if self._watch is not None:
            self._watch.evaluated()
            self._foretell(self._watch.run_left)
        if self._live is None:
            accuracy = shown(metrics["eval_accuracy"], "eval_accuracy" in self._shares)
            self._print(
                f"step {metrics['step']:>4}  held-out accuracy {accuracy}  "
                f"reward {metrics['eval_reward']:.4f}  length {metrics['eval_completions/mean_length']:.1f}"
                + "".join(f"  {text}" for text in _instruments(metrics, self._shares))
            )

    def on_train_end(self, summary: Summary) -> None:
        """Say what improved from what to what, and where everything lies."""
        self.close()
        self.console.print(_summary(summary))
        if summary.ended != "finished" and summary.go_on:
            self._print(f"go on with: {escape(summary.go_on)}")  # not in the frame: it is one line, to be copied

    def close(self) -> None:
        """Give the screen back."""
        self._over.set()
        if self._beats is not None:
            self._beats.join()
            self._beats = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        self._spoken = time.monotonic()
        self.console.print(line, highlight=False, soft_wrap=True)

    def _beat(self) -> None:
        """Look at what is under way, again and again."""
        while not self._over.wait(BEATS):
            watch = self._watch
            look = watch and watch.look()
            if look:
                self._foretell(look.run_left)
            if self._live is not None:
                self._live.refresh()
            elif watch and look and time.monotonic() - self._spoken > LINES:
                step = watch.done + (look.work.name == "members")
                run = "" if look.run_left is None else f", of the run {duration(look.run_left)}"
                figures = "  ".join(_figures(look, self._members))
                self._print(f"step {step:>4}/{self._steps}  {_name(look)} {figures}{run}")

    def _foretell(self, run_left: float | None) -> None:
        """Say once what the run will take, and again when it is known that completions end early."""
        watch = self._watch
        if watch is None or not run_left or watch.step_seconds is None or self._foretold in (False, watch.most):
            return
        self._foretold = watch.most
        self._print(outlook(watch.step_tokens, watch.step_seconds, run_left, most=watch.most, how="at the pace so far"))
        if warning := too_long(run_left):
            log.warning("%s", warning)

    def _bars(self) -> RenderableType:
        """The run, and what is under way."""
        bars = Table.grid(padding=(0, 2))
        watch = self._watch
        if watch is None:
            return bars
        seconds = time.monotonic() - watch.began
        look = watch.look()
        left = look.run_left if look else watch.run_left
        bars.add_row(
            f"step {watch.done}/{self._steps}",
            ProgressBar(total=max(1, self._steps), completed=watch.done, width=BAR),
            duration(seconds) + (f"  {'at most' if watch.most else 'about'} {duration(left)} left" if left else ""),
        )
        if look is not None:
            bars.add_row(
                Text(_name(look)),
                ProgressBar(total=1.0, completed=look.share, width=BAR, pulse=not look.share),
                "  ".join(_figures(look, self._members)),
            )
        return bars

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        if self._last:
            m = self._last
            curve = _curve(self._rewards)
            spread = (
                f"{m['reward']:.4f} ± {m['reward_std']:.4f}  (members {m['reward_min']:.3f} to {m['reward_max']:.3f})"
            )
            table.add_row("reward", curve, spread)
        if self._accuracies:
            first = self._accuracies[0][1]
            last = self._accuracies[-1][1]
            curve = _curve([a for _, a in self._accuracies])
            share = "eval_accuracy" in self._shares
            table.add_row(
                "held-out accuracy",
                curve,
                f"{shown(first, share)} -> {shown(last, share)} at step {self._accuracies[-1][0]}",
            )
        if self._last:
            m = self._last
            figures = f"length {m['completions/mean_length']:.1f}, cut off {m['completions/clipped_ratio']:.1%}"
            table.add_row("step", f"{m['step_time']:.2f} s, {m['num_tokens']:,.0f} tokens so far", figures)
        parts: list[RenderableType] = [self._bars(), table]
        if self._sample is not None:
            parts.append(sample_panel(self._sample))
        return Group(*parts)


def _name(look: Look) -> str:
    """What is under way, as it is called."""
    return printable(look.work.name)


def _figures(look: Look, members: int) -> list[str]:
    """How far it has come; `members` of a step have been graded."""
    found = [f"{look.share:.0%}", duration(look.seconds)]
    if look.work.name == "members":
        found.insert(0, f"{members}/{look.work.pieces}")
    if look.tokens_per_second:
        found.append(f"{look.tokens_per_second:,.0f} tokens/s")
    if look.left is not None:
        found.append(f"{duration(look.left)} left")
    return found


def sample_panel(sample: Sample) -> Panel:
    """A prompt and its completion, with nothing in them that moves the cursor."""
    prompt = sample.prompt if len(sample.prompt) <= PROMPT_END else "…" + sample.prompt[-PROMPT_END:]
    text = Text.assemble((printable_lines(prompt), "dim"), (printable_lines(sample.completion), "bold"))
    reward = "not applicable" if sample.reward is None else f"{sample.reward:.3f}"
    return Panel(text, title=f"a completion, reward {reward}", title_align="left")


def _curve(values: list[float]) -> str:
    values = values[-CURVE:]
    low = min(values)
    high = max(values)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] for v in values)


def _instruments(now: Metrics, shares: Collection[str], then: Metrics | None = None) -> list[str]:
    """What else an evaluation tells: pass@k, how far the model has come from its base, tasks that are watched."""
    found = []
    passes = {key.removeprefix("eval_"): value for key, value in now.items() if key.startswith("eval_pass@")}
    if passes:
        found.append(", ".join(f"{key} {value:.1%}" for key, value in passes.items()))
    if "eval_weights/relative_change" in now:
        kl = f"KL to the base model {now['eval_kl']:.4f}, " if "eval_kl" in now else ""
        found.append(f"{kl}weights changed by {now['eval_weights/relative_change']:.3%}")
    for key, value in now.items():
        if key.startswith("watch/") and key.endswith("/accuracy"):
            before = f"{shown(then[key], key in shares)} -> " if then and key in then else ""
            found.append(
                f"{key.removeprefix('watch/').removesuffix('/accuracy')} {before}{shown(value, key in shares)}"
            )
    return [printable(text) for text in found]


def _summary(s: Summary) -> Panel:
    lines = [f"{s.ended} after {amount(s.steps, 'steps')}, {duration(s.seconds)}"]
    if s.before:
        key = "eval_accuracy"
        share = key in s.shares
        length = "eval_completions/mean_length"
        lacking = dict.fromkeys(("step", "eval_reward", length), math.nan)  # in a journal that others wrote
        before, after, best = ({**lacking, **metrics} for metrics in (s.before, s.after, s.best))
        lines += [
            f"[bold]held-out accuracy {shown(before[key], share)} -> {shown(after[key], share)}[/] "
            f"at step {after['step']}, best {shown(best[key], share)} at step {best['step']}",
            f"held-out reward {before['eval_reward']:.3f} -> {after['eval_reward']:.3f}, "
            f"length {before[length]:.1f} -> {after[length]:.1f} tokens",
        ]
        lines += [escape(text) for text in _instruments(s.after, s.shares, s.before)]
    gone = {"steps the guard took back": s.taken_back, "times it went back to the best": s.back}
    if any(gone.values()):
        lines.append(", ".join(f"{what}: {times}" for what, times in gone.items() if times))
    lines.append(f"in {escape(str(s.run))}:")
    lines += [f"  {name:<14} {what}" for name, what in CONTENTS.items() if (s.run / name).exists()]
    return Panel("\n".join(lines), title="run", title_align="left")
