"""The fused decoder's rows: prompts join at any token, and reuse keys and values that are cached of their beginning.

A conversation that goes on finds all its earlier turns cached, in the row in which they were decoded, and one that
begins like another copies its keys and values. Only what is new is computed. What is reused changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from estune.completion import Sampling
from estune.engines.continuous import Request
from estune.engines.cpu.caches import Cache
from estune.engines.cpu.fused import PREFILL_TOKENS, FusedDecoder
from estune.engines.cpu.products import Array
from estune.engines.cpu.simd import WIDTH
from estune.engines.progress import Meter
from estune.engines.sampling import choose
from estune.engines.tree import Places

FEWEST_ROWS = 8
FEWEST_SLOTS = 256
WORTH_COPYING = 16
"""Tokens of a common beginning from which on it is copied, or waited for while another row computes it."""


@dataclass(slots=True)
class _Row:
    """A row that decodes."""

    sampling: Sampling
    prompt: int  # tokens of it
    known: int  # tokens so far: those of the prompt and of its completion
    source: tuple[int, _Row] | None  # another row, and its number, that is computing this one's beginning


class FusedRows:
    """As `Rows`, for weights that stay as they are; one at a time for a decoder, in one thread.

    Args:
        decoder: whose storage it uses.
        fitting: tells for a number of slots how many rows of that length there is memory for.
    """

    most_idle: float | None = None

    def __init__(self, decoder: FusedDecoder, fitting: Callable[[int], int]) -> None:
        self._decoder = decoder
        self._fitting = fitting
        self._none = decoder.caches.kept("none", 1, 0)
        self._ids = np.full((0, 0), -1)  # [rows, slots]: the tokens of each row
        self._cached = np.zeros(0, np.int64)  # [rows]: how many of them are cached
        self._left = np.zeros(0, np.int64)  # [rows]: when the row was left, by `_clock`
        self._rows: dict[int, _Row] = {}
        self._cache: Cache | None = None
        self._clock = 0
        self._meter = Meter()

    def clear(self) -> None:
        """Begin anew with other weights: what is cached is no longer true."""
        self._decoder.begin()
        self._rows.clear()
        self._ids[:] = -1  # which no prompt begins with
        self._meter = Meter()

    def join(self, request: Request) -> int | None:
        """As `Rows.join`."""
        prompt = np.asarray(request.prompt_ids)
        needed = len(prompt) + request.sampling.max_new_tokens
        rows, slots = self._ids.shape
        if needed > slots:
            slots = max(FEWEST_SLOTS, 1 << (needed - 1).bit_length())
        most = self._fitting(slots)
        if len(self._rows) >= most and self._rows:
            return None
        if len(self._rows) == rows:
            rows = min(most, max(FEWEST_ROWS, 2 * rows))
        rows = max(1, min(rows, most), *(row + 1 for row in self._rows))
        if (rows, slots) != self._ids.shape:
            self._grow(rows, slots)
        row = self._place(prompt)
        self._decoder.reach(needed)
        self._rows[row] = _Row(request.sampling, len(prompt), len(prompt), self._computing(row, prompt))
        return row

    def step(self) -> list[tuple[int, list[int]]]:
        """Run one forward, over a token of each row that decodes and as many of prompts as fit beside them."""
        self._copy_beginnings()
        # 1. Rows that decode have one token to compute; prompts share the room that is left, the shortest first.
        pending = {
            row: state.known - int(self._cached[row]) for row, state in self._rows.items() if state.source is None
        }
        room = max(PREFILL_TOKENS, len(pending))
        parts: list[tuple[int, int]] = []
        for row in sorted(pending, key=pending.__getitem__):
            count = min(pending[row], room)
            if count:
                parts.append((row, count))
                room -= count
        # 2. Compute them, with the last hidden states of the rows whose last token is among them.
        numbers = np.concatenate([np.full(count, row) for row, count in parts])
        positions = np.concatenate([self._cached[row] + np.arange(count) for row, count in parts])
        ends = np.cumsum([count for _, count in parts]) - 1
        whole = np.array([count == pending[row] for row, count in parts])
        places = Places.of(numbers, positions)
        assert self._cache is not None
        hidden = self._decoder.forward(
            self._ids[numbers, positions], places, places, self._cache, self._none, 0, ends[whole]
        )
        ready = [row for (row, _), done in zip(parts, whole, strict=True) if done]
        for row, count in parts:
            self._cached[row] += count
        self._meter.read(len(numbers) - len(ready))
        # 3. Choose their next tokens.
        tokens = self._choose(hidden, ready)
        self._meter.wrote(len(ready))
        for row, token in zip(ready, tokens, strict=True):
            state = self._rows[row]
            self._ids[row, state.known] = token
            state.known += 1
        return [(row, [token]) for row, token in zip(ready, tokens, strict=True)]

    def leave(self, row: int) -> None:
        """As `Rows.leave`; what it has cached stays until another prompt takes its place."""
        del self._rows[row]
        self._clock += 1
        self._left[row] = self._clock

    def _choose(self, hidden: Array, rows: list[int]) -> list[int]:
        """The next token of each of `rows`, from hidden states `[rows, hidden]`."""
        found = np.zeros(len(rows), np.int64)
        kinds: dict[tuple[float, float, int], list[int]] = {}
        for i, row in enumerate(rows):
            sampling = self._rows[row].sampling
            kind = (sampling.temperature, sampling.top_p, sampling.top_k) if sampling.temperature else (0.0, 1.0, 0)
            kinds.setdefault(kind, []).append(i)
        for (temperature, _, _), chosen in kinds.items():
            states = [self._rows[rows[i]] for i in chosen]
            if not temperature:
                found[chosen] = self._decoder.largest(hidden[chosen])
                continue
            found[chosen] = choose(
                self._decoder.logits(hidden[chosen]),
                states[0].sampling,
                torch.zeros(len(chosen), dtype=torch.int64),
                torch.tensor([state.known - state.prompt for state in states]),
                torch.tensor([state.sampling.seed for state in states]),
            ).numpy()
        return found.tolist()

    def _place(self, prompt: Array) -> int:
        """Put a prompt into a free row: the one that has most of its beginning, or else the one left longest ago."""
        free = [row for row in range(len(self._ids)) if row not in self._rows]
        common = self._common(prompt)
        best = max(free, key=lambda row: (common[row] if common[row] >= WORTH_COPYING else 0, -self._left[row]))
        kept = int(common[best])
        self._ids[best, len(prompt) :] = -1
        self._ids[best, : len(prompt)] = prompt
        self._cached[best] = kept
        other = int(common.argmax())
        if common[other] >= kept + WORTH_COPYING:
            self._copy(other, best, int(common[other]))
        return best

    def _common(self, prompt: Array) -> Array:
        """How many of a prompt's first tokens, its last left out, each row has cached: `[rows]`."""
        length = min(len(prompt) - 1, self._ids.shape[1])
        same = self._ids[:, :length] == prompt[:length]
        return np.minimum(_leading(same), self._cached)

    def _computing(self, row: int, prompt: Array) -> tuple[int, _Row] | None:
        """Another row that is about to compute more of this prompt's beginning than `row` has cached, or None."""
        others = np.array([n for n, state in self._rows.items() if self._cached[n] < state.prompt], np.int64)
        if not len(others):
            return None
        length = len(prompt) - 1
        common = _leading(self._ids[others, :length] == prompt[:length])
        best = int(common.argmax())
        if common[best] < self._cached[row] + WORTH_COPYING:
            return None
        other = int(others[best])
        return other, self._rows[other]

    def _copy_beginnings(self) -> None:
        """Let rows go on that waited for another to compute a common beginning, once it has done so or is gone."""
        for row, state in self._rows.items():
            if state.source is None:
                continue
            other, source = state.source
            if self._rows.get(other) is source and self._cached[other] < source.prompt:
                continue
            state.source = None
            common = self._common(self._ids[row, : state.prompt])
            best = int(common.argmax())
            if common[best] > self._cached[row]:
                self._copy(best, row, int(common[best]))

    def _copy(self, source: int, target: int, count: int) -> None:
        """Give a row the first `count` keys and values of another."""
        if source != target:
            assert self._cache is not None
            blocks = -(-count // WIDTH)
            self._cache.keys[:, target, :, :blocks] = self._cache.keys[:, source, :, :blocks]
            self._cache.values[:, target, :, :count] = self._cache.values[:, source, :, :count]
        self._cached[target] = count

    def _grow(self, rows: int, slots: int) -> None:
        """Make room for `rows` rows of `slots` slots; rows that decode stay, in their places."""
        kept = min(rows, len(self._ids))
        old = self._cache
        width = self._ids.shape[1]
        ids = np.full((rows, slots), -1)
        ids[:kept, :width] = self._ids[:kept]
        cached = np.zeros(rows, np.int64)
        cached[:kept] = self._cached[:kept]
        left = np.zeros(rows, np.int64)
        left[:kept] = self._left[:kept]
        self._cache = self._decoder.caches.new(rows, slots)
        if old is not None and kept:
            self._cache.keys[:, :kept, :, : old.keys.shape[3]] = old.keys[:, :kept]
            self._cache.values[:, :kept, :, : old.values.shape[3]] = old.values[:, :kept]
        self._ids = ids
        self._cached = cached
        self._left = left


def _leading(same: Array) -> Array:
    """How many values are true before the first that is not, of each line of bool `[lines, values]`."""
    found: Array = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    return found
