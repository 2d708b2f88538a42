"""Where a run stands: its weights, its strategy and its judge, which after every step are what the journal says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from estune.charts.words import amount
from estune.config import Config
from estune.errors import EstuneError
from estune.es.strategy import Update
from estune.files import remove
from estune.journal.journal import Journal
from estune.journal.records import EvaluationRecord
from estune.journal.replay import holds, rebuild
from estune.pool.base import Pool
from estune.pool.waiting import told_while
from estune.run.directory import RunDirectory
from estune.run.judged import Judge
from estune.run.make import make_strategy, recall, state_after
from estune.weights.checkpoint import Checkpoint
from estune.weights.integers import in_window
from estune.weights.moments import has_moments


class Standing:
    """A run between two of its steps: it goes on by an update, or back to where it stood.

    Args:
        config: the settings.
        run, journal, base: the run's directory, its journal, and the model that it began with.
        pool: has the weights.

    Attributes:
        strategy: asks the next step's members.
        judge: gives them their fitness.
    """

    def __init__(self, config: Config, run: RunDirectory, journal: Journal, base: Checkpoint, pool: Pool) -> None:
        self.config = config
        self.run = run
        self.journal = journal
        self.pool = pool
        self.strategy = make_strategy(config, journal)
        self.judge = Judge(config, journal.state)
        self._base = base

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.strategy.step

    def state(self) -> dict[str, float]:
        """What the journal keeps of a step, so that strategy and judge can go on after it."""
        return self.strategy.state() | self.judge.state()

    def rebuild(self, *, anew: bool = False) -> None:
        """Bring the weights to the journal's last step, from the latest checkpoint that is there.

        Of a run with moments, which checkpoints do not hold, all steps are made again. Of one with integer weights a
        checkpoint will do that was saved where a window ended.

        Args:
            anew: the weights are not the base model's as yet, but some step's.

        Raises:
            EstuneError: the steps lead elsewhere than the journal says.
        """
        journal = self.journal
        run = self.run
        done = len(journal.steps)
        before = len(journal.inherited)
        whole = (s for s in run.checkpoints() if s <= done and not in_window(journal.header.rule, before + s))
        sound = (s for s in whole if holds(run.checkpoint(s), self._base, journal, journal.header.dtype))
        start = 0 if has_moments(record.update for record in journal.history) else next(sound, 0)
        checkpoint = (before + start, run.checkpoint(start)) if start else None
        with told_while(f"replaying {amount(done - start, 'steps')}"):
            found = self.pool.rebuild(journal.history, checkpoint or ((0, self._base.path) if anew else None))
        if found != journal.fingerprint():
            where = f"checkpoint-{start} and " if start else ""
            raise EstuneError(
                f"{run.path}: {where}{amount(done - start, 'steps')} of replay give fingerprint {found}, the "
                f"journal says {journal.fingerprint()}" + (f"; remove checkpoint-{start} and resume" if start else "")
            )

    def update(self, fitness: Sequence[float | None], sigma: float) -> tuple[Update, str]:
        """Change the weights by what members came to, who were perturbed by `sigma`; the update, and the fingerprint.

        That is for the journal to record, or to be taken back.
        """
        # Members asked ahead of time were perturbed by the sigma of then.
        update = replace(self.strategy.tell(fitness), sigma=sigma)
        return update, self.pool.apply(update)

    def take_back(self, update: Update) -> tuple[Update, str]:
        """Make the last update, not in the journal yet, one that changes nothing: that one, and the fingerprint."""
        self.rebuild(anew=True)
        nothing = self.strategy.take_back(update)
        return nothing, self.pool.apply(nothing)

    def go_back(self, record: EvaluationRecord, step: int) -> EvaluationRecord:
        """Go on from the weights after an earlier step, with half the learning rate, and record it.

        Args:
            record: the evaluation for which it goes back; not in the journal yet.
            step: so many steps had been taken then.

        Returns:
            The evaluation as the journal has it.
        """
        for number in self.run.checkpoints():
            if number > step:
                remove(self.run.checkpoint(number))
        caution = self.strategy.state().get("caution", 1.0) / 2
        state = state_after(self.journal, step) | {"caution": caution}
        record = replace(record, back=step, state=state)
        self.journal.append_evaluation(record)
        self.rebuild(anew=True)
        recall(self.strategy, self.journal)
        self.judge = Judge(self.config, self.journal.state)
        return record

    def save_best(self) -> None:
        """Write the weights as those of the best evaluation."""
        self.pool.save(self.run.best, self.journal.header.save_dtype)

    def save_final(self) -> None:
        """Write the weights as those that the run ends with."""
        self.pool.save(self.run.final, self.journal.header.save_dtype)

    def save_checkpoint(self) -> None:
        """Write the weights as they are trained, to resume from."""
        self.pool.save(self.run.checkpoint(self.step), self.journal.header.dtype)

    def remake_lost(self) -> None:
        """Write again what a kill or a power cut has taken of checkpoints and of `best`."""
        header = self.journal.header
        for step in self.run.checkpoints():
            path = self.run.checkpoint(step)
            if step <= self.step and not holds(path, self._base, self.journal, header.dtype):
                self._remake(path, step, header.dtype)
        best = self.journal.best
        if best is not None and not holds(self.run.best, self._base, self.journal, header.save_dtype, best.step):
            self._remake(self.run.best, best.step, header.save_dtype)

    def _remake(self, path: Path, step: int, dtype: str) -> None:
        """Write the checkpoint of a step that the run has left behind."""
        remove(path)
        rebuild(self.journal, self._base, path, step, dtype)
