"""All monitors of a run, told together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from estune.pool.base import Pool
from estune.run.monitors.base import Monitor, Request, Work


class Listeners:
    """The monitors of a run.

    Args:
        monitors: who they are.
        pool: what the run generates with.
        max_new_tokens: of a completion.
    """

    def __init__(self, monitors: Sequence[Monitor], pool: Pool, max_new_tokens: int) -> None:
        self._monitors = monitors
        self._pool = pool
        self._max_new_tokens = max_new_tokens

    def tell(self, call: Callable[[Monitor], None]) -> None:
        """Call each monitor, in their order."""
        for monitor in self._monitors:
            call(monitor)

    def tell_work(self, name: str, prompts: Sequence[Sequence[int]], pieces: int, times: int = 1) -> None:
        """Tell what is generated from here on.

        Args:
            name: as `Work` has it.
            prompts: token ids of what is completed.
            pieces: that engines take one by one.
            times: completions of each prompt.
        """
        before = self._pool.progress()
        work = Work(
            name=name,
            pieces=pieces,
            prompt_tokens=times * sum(map(len, prompts)),
            completions=times * len(prompts),
            places=times * len(prompts) * self._max_new_tokens,
            engines=self._pool.engines,
            done=lambda: self._pool.progress().since(before),
        )
        self.tell(lambda m: m.on_generate_begin(work))

    def requests(self) -> set[Request]:
        """What any of them asks for now."""
        return {request for monitor in self._monitors for request in monitor.requests()}
