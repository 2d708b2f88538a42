"""How this machine's processor computes a model fastest: in which type, by how many engines, on how many threads each.
It is found by trying, in a second of the matrix products that a token takes.

It depends on whether the processor multiplies bfloat16, on how many of its cores its memory can feed, and on how many
rows share one reading of the weights. No list of processors would tell.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from estune.engines.cpu.products import Products
from estune.pool.waiting import told_while

log = logging.getLogger(__name__)

TRYING = "trying what this processor is fastest with"
MOST_TRIED = 1 << 28  # elements of all engines' matrices together
MOST_OF_ONE = 1 << 25  # and of one engine's: more than the last cache holds
SHARE = 8  # of an engine's elements, one in so many may be one matrix's
TURNS = 2  # that ways take, so that a busy moment slows more than one
ROUNDS = 2  # of a turn; the best of all counts, which is not one in which something is compiled
FEW_ROWS = 128  # up to which it is asked what twice as many would cost
CHEAP = 1.5  # times the cost, up to which twice as many rows are worth a word
ALIKE = 0.95  # of the best's speed, which another time may be the best's


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute with weights.

    Attributes:
        dtype: float32 or bfloat16.
        replicas: engines side by side.
        threads: threads of each engine.
    """

    dtype: str
    replicas: int
    threads: int

    def __str__(self) -> str:
        engines = "one engine" if self.replicas == 1 else f"{self.replicas} engines"
        return f"{self.dtype} by {engines} of {self.threads} thread{'s' * (self.threads > 1)}"


def ways(dtypes: Sequence[str], cores: int, most: int, *, replicas: int | None, threads: int | None) -> list[Way]:
    """The ways that there are to try: the cores, shared out in powers of two.

    Args:
        dtypes: types that the weights may have.
        cores: to share out.
        most: engines that there is memory and work for.
        replicas, threads: those of the settings, if they are set.
    """
    powers = {1 << i for i in range(cores.bit_length())}
    shares = [threads] if threads else sorted(n for n in powers | {cores} if n * (replicas or 1) <= cores) or [1]
    counts = [replicas or max(1, min(most, cores // share)) for share in shares]
    return [Way(dtype, *split) for dtype in dtypes for split in zip(counts, shares, strict=True)]


def fastest(
    shapes: Sequence[tuple[int, int]], rows: int, choices: Sequence[Way], *, own: bool, together: bool = False
) -> Way:
    """The first of those ways that are about as fast as the fastest.

    Args:
        shapes: shapes of the model's matrices, `[columns, width]`; without any, the first way is taken.
        rows: decoded together.
        choices: to compare.
        own: products are those of our own kernel, not PyTorch's.
        together: the rows are those of several members, so that more prompts of each have nothing to gain.
    """
    if not shapes:
        return choices[0]
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1

    speeds = dict.fromkeys(choices, 0.0)
    with told_while(TRYING, share=lambda: done / (len(choices) * TURNS * ROUNDS)):
        for way in [*choices] * TURNS:
            speeds[way] = max(speeds[way], speed_of(way, shapes, rows, own=own, tick=tick))
    each = 2 * sum(map(math.prod, shapes))  # operations a token
    found = ", ".join(f"{way} {speed / each:,.0f}" for way, speed in speeds.items())
    log.info("tokens a second, by their matrix products alone: %s", found)
    chosen = next(way for way in choices if speeds[way] >= ALIKE * max(speeds.values()))
    if rows < FEW_ROWS and not together:
        said = more_prompts(rows, speeds[chosen], speed_of(chosen, shapes, 2 * rows, own=own, tick=tick))
        if said:
            log.warning("%s", said)
    return chosen


def more_prompts(rows: int, speed: float, doubled: float) -> str | None:
    """Advice if twice the prompts would cost little more, as weights are read once for all rows.

    Args:
        rows: decoded together.
        speed: operations a second with so many rows, as measured.
        doubled: the same with twice as many rows.
    """
    cost = 2 * speed / doubled
    if cost > CHEAP:
        return None
    return (
        f"prompts_per_step={2 * rows} would cost {cost:.1f} times what {rows} do: weights are read once for all of a "
        "member's prompts (measured); a step of the same cost with fewer members and more prompts sees more of them"
    )


def speed_of(way: Way, shapes: Sequence[tuple[int, int]], rows: int, *, own: bool, tick: Callable[[], None]) -> float:
    """Operations a second of all engines together."""
    some = list(_some(shapes, min(MOST_OF_ONE, MOST_TRIED // way.replicas)))
    dtype: torch.dtype = getattr(torch, way.dtype)
    engines = [[torch.full(shape, 0.01, dtype=dtype) for shape in some] for _ in range(way.replicas)]
    widths = {width for _, width in some}
    inputs = {width: torch.full((rows, width), 0.01, dtype=torch.float32 if own else dtype) for width in widths}

    def multiply(weights: Sequence[torch.Tensor]) -> None:
        torch.set_num_threads(way.threads)  # of the thread that this is
        product = product_of(own=own)
        for weight in weights:
            product(inputs[weight.shape[1]], weight)

    def once() -> float:
        began = time.perf_counter()
        list(side_by_side.map(multiply, engines))
        seconds = time.perf_counter() - began
        tick()
        return seconds

    before = torch.get_num_threads()
    with ThreadPoolExecutor(way.replicas) as side_by_side:
        seconds = min(once() for _ in range(ROUNDS))
    torch.set_num_threads(before)
    return way.replicas * 2 * rows * sum(map(math.prod, some)) / seconds


def product_of(*, own: bool) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """What multiplies activations with a matrix: our kernel, which takes them in float32, or PyTorch's."""
    if not own:
        return linear
    products = Products()

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> object:
        bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
        return products(x.numpy(), bits.numpy())

    return multiply


def _some(shapes: Sequence[tuple[int, int]], budget: int) -> Iterator[tuple[int, int]]:
    """Shapes of matrices that have this many elements, in any order, large ones cut."""
    most = budget // SHARE
    for columns, width in itertools.cycle(random.Random(0).sample(shapes, len(shapes))):
        if budget <= 0:
            return
        kept = min(columns, max(1, most // width))
        yield kept, width
        budget -= kept * width
