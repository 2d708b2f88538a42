"""What earlier steps add to an update: momentum and reuse of samples, in seeds and coefficients alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from estune.es.strategy import Pair, float32

NEGLIGIBLE = 0.05  # a factor below it is left out


@dataclass(frozen=True, slots=True)
class Momentum:
    """A share of earlier steps in each update.

    The update is (1 - beta) * sum_k beta^k u_(t-k) over the window, where u_t is what step t's own members give: the
    moving average of Adam's first moment (arXiv 1412.6980, without its correction of the start), cut off. A window of 1
    is the reuse of the last step's samples: beta is then their weight against the new ones.

    What is reused was measured around another base: each step back counts exp(-d^2 / 2) as much, where d is the
    distance that the base has moved since, in sigmas and per element: from coefficients alone d^2 = sum c^2 / sigma^2,
    as if each step went a way of its own. This factor is our own. The ratio of two Gaussians' densities, by which
    samples are properly reused, is a product over all elements, of which a language model has so many that nothing
    would be left.
    """

    beta: float = 0.0  # 0: no step but the last counts
    window: int | None = None  # steps back at most; as far as beta^k is 0.05 or more, if None

    @property
    def steps(self) -> int:
        """How many steps back count."""
        if not self.beta:
            return 0
        most = math.floor(math.log(NEGLIGIBLE) / math.log(self.beta))
        return most if self.window is None else self.window

    @property
    def own(self) -> float:
        """The factor of a step's own members."""
        return 1 - self.beta


class Past:
    """The last steps as far as the next ones need them: the members' terms, and how far the base has moved since.

    Args:
        momentum: how much of them counts.
        window: steps that are wanted, whatever momentum wants.
    """

    def __init__(self, momentum: Momentum, window: int = 0) -> None:
        self._momentum = momentum
        most = max(1, momentum.steps, window)
        self._steps: deque[tuple[Pair, ...]] = deque(maxlen=most)
        self._moves: deque[float] = deque(maxlen=most)  # squared, per element, in weights' units

    @property
    def steps(self) -> list[tuple[Pair, ...]]:
        """Of each step that counts, the latest first, what its own members gave."""
        return list(self._steps)

    def factors(self, sigma: float) -> list[float]:
        """The factors of the last steps' terms, the latest first."""
        found = []
        moved = 0.0
        for back, move in enumerate(list(self._moves)[: self._momentum.steps], 1):
            moved += move / sigma**2
            found.append(self._momentum.beta**back * math.exp(-moved / 2))
        return found

    def terms(self, factors: Sequence[float]) -> tuple[Pair, ...]:
        """The terms that these factors stand for, the latest step's first."""
        return scaled(self._steps, factors)

    def add(self, own: Sequence[Pair], whole: Sequence[Pair], *, instead: bool = False) -> None:
        """Take in a step: what its own members gave, and all that was added to the base; `instead` of the last one."""
        if instead:
            self._steps.popleft()
            self._moves.popleft()
        self._steps.appendleft(tuple(own))
        self._moves.appendleft(squared_norm(whole))

    def state(self) -> list[tuple[float, list[Pair]]]:
        """Of each step that counts, the latest first, how far it moved the base and its terms; as JSON holds it."""
        return [(move, list(terms)) for move, terms in zip(self._moves, self._steps, strict=True)]

    def recall(self, state: Sequence[tuple[float, Sequence[Pair]]]) -> None:
        """Be what gave this state."""
        self._moves.clear()
        self._steps.clear()
        for move, terms in state:
            self._moves.append(move)
            self._steps.append(tuple((seed, c) for seed, c in terms))


def scaled(steps: Iterable[Sequence[Pair]], factors: Sequence[float]) -> tuple[Pair, ...]:
    """The terms of steps, each step's times its factor."""
    pairs = zip(factors, steps, strict=False)
    return tuple((seed, float32(factor * c)) for factor, step in pairs for seed, c in step)


def norm(terms: Iterable[Pair]) -> float:
    """Of the sum of these terms, for noise of norm 1."""
    return math.sqrt(squared_norm(terms))


def squared_norm(terms: Iterable[Pair]) -> float:
    """The square of `norm`; a mirrored pair's two terms are of one seed."""
    together: dict[int, float] = {}
    for seed, c in terms:
        together[seed] = together.get(seed, 0.0) + c
    return math.fsum(c * c for c in together.values())
