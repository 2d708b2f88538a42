"""How much of a step a reward function grades with one number: a completion, a corpus or a population."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from estune.errors import EstuneError

Function = TypeVar("Function", bound=Callable[..., Any])
Level = Literal["completion", "corpus", "population"]


def corpus_level(function: Function) -> Function:
    """Mark a reward function that returns one number, or None, for all completions that it is called with.

    It is called as others are, once for each member with all its completions of a step, and once for an evaluation. The
    number is every completion's score: the member's mean is the number itself.
    """
    return _marked(function, "corpus")


def population_level(function: Function) -> Function:
    """Mark a reward function that is called once a step with what all members wrote, and returns a number for each.

    `completions` and `completion_ids` are then lists of lists, one for each member, in the order of the members;
    `prompts` and other columns are as they are for one member, since all members have the same. The number, or None, is
    the score of every completion of the member. In an evaluation it does not apply: there is one set of weights.
    """
    return _marked(function, "population")


def level_of(function: Any) -> Level:
    """The level that a function is marked with, by default a completion's; a partial has that of what it wraps."""
    while isinstance(function, functools.partial) and not hasattr(function, "level"):
        function = function.func
    found: Level = getattr(function, "level", "completion")
    return found


def _marked(function: Function, level: Level) -> Function:
    setattr(function, "level", level)  # noqa: B010 - a function has no such attribute to the type checker
    return function


def refuse_level(functions: Iterable[Any], where: str, why: str, *levels: Level) -> None:
    """Refuse functions of these levels where they cannot be used.

    Raises:
        EstuneError: there is such a function; the message names the first.
    """
    for function in functions:
        level = level_of(function)
        if level in levels:
            name = getattr(function, "__name__", type(function).__name__)
            raise EstuneError(f"{where}: reward {name} is {level}-level, and {why}: leave it out, or give another")
