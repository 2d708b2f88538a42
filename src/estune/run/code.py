"""The code that a run's rewards come from: which files they are, and their hashes.

What a function or a file imports is not looked at, nor what a closure or an object holds.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Iterable
from hashlib import blake2b
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from estune.grading.convention import RewardFunction, reward_name
from estune.journal.identity import hash_of
from estune.rewards.judge import Judge, JudgeConfig
from estune.tasks import TaskOptions
from estune.tasks.custom import CustomConfig
from estune.tasks.mix import MixConfig, Only
from estune.tasks.own import OwnConfig
from estune.tasks.preference import PreferenceConfig

OURS = "estune.rewards."


def code_of(functions: Iterable[RewardFunction], options: TaskOptions | None = None) -> dict[str, str]:
    """Hash of the source of each reward function, and of each Python file that a task's settings name.

    Functions of this package are left out, and so is what has no source, such as a function typed into a prompt. A
    reward model's is of its weights and its tokenizer, a `functools.partial`'s of its arguments too, and a judge's of
    its rubric and whatever else it is asked with.

    Args:
        functions: the task's.
        options: the settings that the task was made by; None for one that was given in Python.
    """
    found: dict[str, str] = {}
    for function in functions:
        source = _source(function)
        if source is not None:
            found[f"reward {reward_name(function)}"] = hash_of(source)
    for reference in [] if options is None else references(options):
        file = code_file(reference)
        if file is not None:
            found[reference] = hash_of(file.read_bytes())
    return found


def references(options: TaskOptions) -> list[str]:
    """What a task's settings name that is code, or may be: files, and functions in files and modules."""
    match options:
        case OwnConfig():
            return [options.name]
        case MixConfig():
            return [reference for each in options.tasks.values() for reference in references(each)]
        case CustomConfig():
            named = options.rewards
        case PreferenceConfig():
            named = [options.reward_model or ""]
        case _:
            return []
    return [name for name in named if _is_code(name)]


def judges(options: TaskOptions) -> list[JudgeConfig]:
    """The judges that a task's settings name: completions go to them, with a key from the environment."""
    match options:
        case MixConfig():
            return [judge for each in options.tasks.values() for judge in judges(each)]
        case CustomConfig(judge=JudgeConfig() as judge):
            return [judge]
        case _:
            return []


def code_file(reference: str) -> Path | None:
    """The Python file that a reference leads to; None where there is none. Imports nothing.

    Args:
        reference: `path/to/file.py`, `path/to/file.py:function` or `package.module.function`.
    """
    path = reference if reference.endswith(".py") else reference.rpartition(":")[0]
    if path.endswith(".py"):
        file = Path(path).expanduser().resolve()
        return file if file.is_file() else None
    places: Iterable[str] = [*sys.path, os.getcwd()]  # as `load_reward` looks
    parts = reference.split(".")[:-1]
    found = None
    for end in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:end]), list(places))
        if found is None:
            return None
        places = found.submodule_search_locations or []
    return Path(found.origin).resolve() if found and found.origin and Path(found.origin).is_file() else None


def _is_code(name: str) -> bool:
    """Whether `load_reward` would run code for it: not for a reward model, nor for what comes with this package."""
    if name.rpartition(":")[0].endswith(".py"):
        return True
    return "/" not in name and "." in name and not Path(name).is_dir() and not name.startswith(OURS)


def _source(function: Any) -> bytes | None:
    if isinstance(function, functools.partial):
        return (_source(function.func) or b"") + _arguments(function) or None
    inner = function.function if isinstance(function, Only) else inspect.unwrap(function)
    if inner is not function:
        return _source(inner)
    if (known := _of_a_model(function)) is not None:
        return known
    if not hasattr(function, "__code__") and not inspect.ismethod(function):
        function = type(function)
    if str(getattr(function, "__module__", "")).startswith(OURS):
        return None
    try:
        return inspect.getsource(function).encode()
    except (OSError, TypeError):  # typed into a prompt, or made by another language
        return None


def _arguments(function: functools.partial[Any]) -> bytes:
    """A partial's arguments: data by its content, functions by their source, other objects by their type alone."""
    given = [*enumerate(function.args), *sorted(function.keywords.items())]
    return "".join(f"\n{name}={_told(value)}" for name, value in given).encode()


def _told(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=_by_kind)
    except (TypeError, ValueError, RecursionError):  # a dictionary by tuples, a list in itself, ...
        return str(_by_kind(value))


def _by_kind(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(_told, value))
    if isinstance(value, Path):
        return str(value)
    source = _source(value) if callable(value) else None
    kind = value if hasattr(value, "__qualname__") else type(value)
    return hash_of(source) if source else f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"


def _of_a_model(function: Any) -> bytes | None:
    """What a judge or a reward model is; None for what is neither."""
    if isinstance(function, Judge):
        return function.definition
    if hasattr(function, "model") and hasattr(function, "tokenizer"):
        return _of_reward_model(function.model, function.tokenizer)
    return None


def _of_reward_model(model: Any, tokenizer: Any) -> bytes:
    import torch

    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = "" if core is None else core.to_str()
    digest.update(f"{rules} {tokenizer.chat_template!r}".encode())
    return digest.digest()
