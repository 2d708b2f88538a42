"""Who evaluates which member: here, the engines of this process, each in a thread of its own.

Threads suffice: torch releases the interpreter while it computes. Members are taken by whoever is free, and a member's
completions depend on its seed alone, so the number of engines changes nothing but the time.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from estune.engines.base import Completion, Engine, Sampling
from estune.strategy import Member, Update
from estune.weights import Weights

# Prompts of an evaluation given to one engine at a time. Fixed, so that batches do not depend on the number of engines.
EVALUATION_BATCH = 128


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A member's completions, one per prompt, and the seconds they took."""

    index: int
    completions: list[Completion]
    perturb_time: float
    generate_time: float


class LocalPool:
    """Engines in this process with one base under all of their weights.

    Args:
        engines: engines with the weights each of them generates with; the first one's base is everyone's.
    """

    def __init__(self, engines: Sequence[tuple[Engine, Weights]]) -> None:
        self.engines = list(engines)
        self.weights = self.engines[0][1]
        self._free: queue.SimpleQueue[tuple[Engine, Weights]] = queue.SimpleQueue()
        for pair in self.engines:
            self._free.put(pair)
        self._threads = ThreadPoolExecutor(len(self.engines), "engine")

    def evaluate(
        self, members: Sequence[Member], sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[Evaluated]:
        """Generate with each member's weights; yields in the order of finishing, while others go on."""
        futures = [
            self._threads.submit(self._evaluate, i, m, sigma, prompt_ids, sampling) for i, m in enumerate(members)
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Generate with the base weights."""
        for _, weights in self.engines:
            weights.restore()
        batches = [prompt_ids[i : i + EVALUATION_BATCH] for i in range(0, len(prompt_ids), EVALUATION_BATCH)]
        done = self._threads.map(lambda batch: self._generate(batch, sampling), batches)
        return [completion for batch in done for completion in batch]

    def apply(self, update: Update) -> None:
        """Add an update to the base of all engines."""
        self.weights.apply(update)

    def close(self) -> None:
        """End the threads; members not yet begun are dropped."""
        self._threads.shutdown(cancel_futures=True)

    def _evaluate(
        self, index: int, member: Member, sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Evaluated:
        engine, weights = pair = self._free.get()
        try:
            start = time.perf_counter()
            weights.perturb(member, sigma)
            perturbed = time.perf_counter()
            completions = engine.generate(prompt_ids, sampling)
            return Evaluated(index, completions, perturbed - start, time.perf_counter() - perturbed)
        finally:
            self._free.put(pair)

    def _generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        engine, _ = pair = self._free.get()
        try:
            return engine.generate(prompt_ids, sampling)
        finally:
            self._free.put(pair)
