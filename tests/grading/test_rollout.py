"""Rollouts on their way to other processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from estune.errors import EstuneError
from estune.grading.modules import Place, load_file

GAME = (
    "class Game:\n"
    "    class Short:\n"
    "        def __init__(self, worth=1):\n            self.worth = worth\n"
    "        def reset(self, row):\n            return row['prompt']\n"
    "        def step(self, completion):\n            return self.worth\n"
)


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("partial", [True, False])
def test_what_only_a_scripts_path_reaches_is_found_by_a_process_without_it(
    tmp_path: Path, package: bool, partial: bool
) -> None:
    """A module beside the script that trains, or in a package there, whose folder is on that script's path alone."""
    name = "games_of_test.short" if package else "short_of_test"
    file = tmp_path / f"{name.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(GAME)
    if package:
        (file.parent / "__init__.py").touch()
    target = "functools.partial(Game.Short, worth=3)" if partial else "Game.Short"
    (tmp_path / "send.py").write_text(
        "import functools, pickle, sys\n"
        f"from {name} import Game\n"
        "from estune.grading.rollout import Rollout\n"
        f"sys.stdout.buffer.write(pickle.dumps(Rollout('environment', {target}, chat=False)))\n"
    )
    sent = subprocess.run([sys.executable, "send.py"], cwd=tmp_path, check=True, capture_output=True).stdout
    code = (
        "import pickle, sys\n"
        "found = pickle.load(sys.stdin.buffer)\n"
        "print(found.kind, found.chat, found.target().step(''))"
    )
    received = subprocess.run([sys.executable, "-P", "-c", code], input=sent, check=True, capture_output=True)
    assert received.stdout.decode().split() == ["environment", "False", "3" if partial else "1"]


def test_what_cannot_be_found_is_said_in_a_line() -> None:
    with pytest.raises(EstuneError, match="module nowhere_of_test cannot be imported by another process: ModuleNot"):
        Place("nowhere_of_test", None, "/nowhere").load()
    sys.path.remove("/nowhere")


def test_a_file_loaded_by_path_is_loaded_by_path(tmp_path: Path) -> None:
    from estune.grading.rollout import Rollout

    (tmp_path / "own.py").write_text(GAME)
    target = load_file(tmp_path / "own.py").Game.Short
    again = pickle.loads(pickle.dumps(Rollout("environment", target)))
    assert again.target is target
