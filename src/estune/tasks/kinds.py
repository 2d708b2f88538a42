"""All tasks that stand alone, found by their names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag

from estune.tasks.code import CodeConfig
from estune.tasks.conciseness import ConcisenessConfig
from estune.tasks.countdown import CountdownConfig
from estune.tasks.countdown_turns import CountdownTurnsConfig
from estune.tasks.custom import CustomConfig
from estune.tasks.gym import PREFIX, GymConfig
from estune.tasks.instructions import InstructionsConfig
from estune.tasks.math import MathConfig
from estune.tasks.openenv import PREFIX as OPENENV
from estune.tasks.openenv import OpenEnvConfig
from estune.tasks.options import TaskOptions
from estune.tasks.own import SUFFIX, OwnConfig
from estune.tasks.preference import PreferenceConfig
from estune.tasks.records import SUFFIXES
from estune.tasks.textarena import PREFIX as TEXTARENA
from estune.tasks.textarena import TextArenaConfig
from estune.tasks.verifiers import PREFIX as VERIFIERS
from estune.tasks.verifiers import VerifiersConfig

DEFAULT = "countdown"

KINDS: dict[str, type[TaskOptions]] = {
    "countdown": CountdownConfig,
    "countdown-turns": CountdownTurnsConfig,
    "conciseness": ConcisenessConfig,
    "math": MathConfig,
    "code": CodeConfig,
    "instructions": InstructionsConfig,
    "preference": PreferenceConfig,
    "gym:NAME": GymConfig,
    "openenv:URL": OpenEnvConfig,
    "textarena:GAME": TextArenaConfig,
    "verifiers:TASKSET": VerifiersConfig,
    "custom": CustomConfig,
    "FILE.py": OwnConfig,
}
PREFIXES = {PREFIX: "gym:NAME", OPENENV: "openenv:URL", TEXTARENA: "textarena:GAME", VERIFIERS: "verifiers:TASKSET"}


def kind_of(name: str) -> str:
    """The kind of task that a name belongs to: a key of `KINDS`, or the name itself."""
    prefixed = next((kind for prefix, kind in PREFIXES.items() if name.startswith(prefix)), None)
    return prefixed or ("FILE.py" if name.endswith(SUFFIX) else name)


def tag_of(value: Any) -> str:
    """The kind in angle brackets, which tell it from a setting where an error says where it is."""
    name = value.get("name", DEFAULT) if isinstance(value, Mapping) else getattr(value, "name", "")
    return f"<{kind_of(str(name))}>"


def named(value: Any, known: Mapping[str, Any] = KINDS) -> Any:
    """A bare name as a section of its own.

    Raises:
        ValueError: there is no such task; the message has the nearest name.
    """
    if isinstance(value, str):
        value = {"name": value}
    name = value.get("name", DEFAULT) if isinstance(value, Mapping) else None
    if name is not None and (not isinstance(name, str) or kind_of(name) not in known):
        if str(name).endswith(SUFFIXES):
            hint = f"rows go to task.data: --task custom --task.data {name} --task.rewards FILE.py:FUNCTION"
        else:
            near = difflib.get_close_matches(str(name), known, 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no task is called {name!r}; {hint}")
    return value


Alone = (
    Annotated[CountdownConfig, Tag("<countdown>")]
    | Annotated[CountdownTurnsConfig, Tag("<countdown-turns>")]
    | Annotated[ConcisenessConfig, Tag("<conciseness>")]
    | Annotated[MathConfig, Tag("<math>")]
    | Annotated[CodeConfig, Tag("<code>")]
    | Annotated[InstructionsConfig, Tag("<instructions>")]
    | Annotated[PreferenceConfig, Tag("<preference>")]
    | Annotated[GymConfig, Tag("<gym:NAME>")]
    | Annotated[OpenEnvConfig, Tag("<openenv:URL>")]
    | Annotated[TextArenaConfig, Tag("<textarena:GAME>")]
    | Annotated[VerifiersConfig, Tag("<verifiers:TASKSET>")]
    | Annotated[CustomConfig, Tag("<custom>")]
    | Annotated[OwnConfig, Tag("<FILE.py>")]
)
AnyTask = Annotated[Alone, Discriminator(tag_of), BeforeValidator(named)]
"""Options of any task but a mix, told apart by `name`."""
