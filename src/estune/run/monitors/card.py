"""The monitor that writes model cards."""

from __future__ import annotations

import logging

from estune.errors import first_line
from estune.run.card import write_cards
from estune.run.directory import RunDirectory
from estune.run.monitors.base import Monitor, Plan, Summary

log = logging.getLogger(__name__)


class CardMonitor(Monitor):
    """Writes model cards into `best` and `final` when the run ends; where one cannot be written, the run ends all the
    same.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._problems = 0

    def on_train_begin(self, plan: Plan) -> None:
        """Note how many problems are held out."""
        self._problems = plan.eval_size

    def on_train_end(self, summary: Summary) -> None:
        """Write the cards."""
        try:
            write_cards(self._run, self._problems)
        except Exception as error:  # of a full disk, of metrics of one's own that cannot be drawn: nothing hangs on it
            log.warning("%s: no model card was written: %s", self._run.path, first_line(error))
