"""Reward functions from what a user writes: a name, a file, a model, or the function itself."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from estune.errors import EstuneError
from estune.grading.convention import RewardFunction
from estune.grading.modules import load_file, one_line


def load_reward(reward: Any) -> RewardFunction:
    """A reward function.

    Args:
        reward: a callable, itself; a transformers sequence-classification model; or a string:
            `path/to/file.py:function`; a model directory or a hub id with a slash, for a reward model; or
            `package.module.function`, imported with the working directory in reach, as TRL's command does.

    Raises:
        EstuneError: there is nothing of that name.
    """
    if isinstance(reward, str):
        path, _, name = reward.rpartition(":")
        if reward.endswith(".py"):
            raise EstuneError(f"reward {reward} is a file: name its function, {reward}:FUNCTION")
        if path.endswith(".py"):
            return _attribute(load_file(Path(path)), name, reward)
        if "/" in reward or Path(reward).is_dir():
            return _model(reward)
        if "." in reward:
            return _imported(reward)
        raise EstuneError(
            f"reward {reward!r} is no name of a reward: give package.module.function, path/to/file.py:function, or the "
            "directory or hub id of a reward model"
        )
    if hasattr(reward, "config") and hasattr(reward, "forward"):
        return _model(reward)
    if callable(reward):
        function: Callable[..., Any] = reward
        return function
    raise EstuneError(f"a reward is {type(reward).__name__}; give a function, a model or the name of one")


def in_conversation(reward: RewardFunction, show: Callable[[dict[str, Any], bool], Any] | None) -> RewardFunction:
    """A reward as it is, but a reward model told how a prompt that is text is shown: as `Task.show`."""
    if hasattr(reward, "show"):
        reward.show = show
    return reward


def _imported(reference: str) -> RewardFunction:
    module_name, name = reference.rsplit(".", 1)
    # Last: a file that lies there, which may be a stranger's run, must not be taken for a library.
    if not reference.startswith("estune.") and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise EstuneError(
            f"reward {reference}: {one_line(error)}; give package.module.function of a module that can be imported, "
            "or path/to/file.py:function"
        ) from error
    return _attribute(module, name, reference)


def _attribute(module: ModuleType, name: str, reference: str) -> RewardFunction:
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise EstuneError(f"reward {reference}: {module.__file__ or module.__name__} has no function {name}")
    found: RewardFunction = function
    return found


def _model(model: Any) -> RewardFunction:
    from estune.rewards.model import RewardModel

    return RewardModel(model)
