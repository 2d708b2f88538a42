"""The plan of the house: which room may import which, read from the imports; and no more rooms than the plan has."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest

import estune
from estune.former import MOVED

SOURCE = Path(estune.__file__).parent
STOREYS = (
    ("errors", "versions", "completion", "former", "children", "noise"),
    ("files", "render", "es", "grading"),
    ("weights", "rewards", "charts"),
    ("journal", "tasks"),
    ("config",),
    ("engines",),
    ("agents",),
    ("pool",),
    ("run",),
    ("trl",),
    ("__init__",),
    ("study",),
    ("cli",),
)
"""From the ground up: a room imports what lies on lower storeys, and nothing of its own or higher ones."""
FLOOR = {room: floor for floor, rooms in enumerate(STOREYS) for room in rooms}
MOST_ROOT_MODULES = 8
LOADS = re.compile(r"(Auto\w+|kind)\.from_(pretrained|config)$")
"""Functions of transformers that can load a model's own code."""
PRIVATE = re.compile(r"_[A-Za-z]")
PATH = re.compile(r"estune(\.\w+)+")
OWN = frozenset({"self", "cls"})
OTHERS = {"_replace", "_schema"}
"""Names that we have, and that tests read of `collections.namedtuple` and PyTorch."""

Node = TypeVar("Node", bound=ast.expr)


@cache
def all_nodes(file: Path) -> list[ast.AST]:
    """The syntax of a file, taken apart once for all tests."""
    return list(ast.walk(ast.parse(file.read_text())))


def rooms_imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and room of each import of estune in a file, wherever it stands."""
    for node in all_nodes(file):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports by a relative path"
            package = node.module == "estune"
            modules = [f"estune.{alias.name}" for alias in node.names] if package else [str(node.module)]
        for module in modules:
            top, _, rest = module.partition(".")
            if top == "estune":
                room = rest.partition(".")[0]
                yield node.lineno, room if room in FLOOR else "__init__"  # a public name, from the package itself


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_one_way(file: Path) -> None:
    room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} is no room of the plan: find its place in STOREYS first"
    for line, other in rooms_imported(file):
        assert other == room or FLOOR[other] < FLOOR[room], (
            f"{file}:{line}: {room} imports {other}, which is not below it"
        )


def nodes(kind: type[Node]) -> Iterator[tuple[str, Node]]:
    """Each piece of syntax of a kind in the package, with where it stands."""
    for file in SOURCE.rglob("*.py"):
        for node in all_nodes(file):
            if isinstance(node, kind):
                yield f"{file}:{node.lineno}", node


def test_no_child_takes_a_file_in_the_working_directory_for_a_library() -> None:
    """Python looks there first, unless it is started with `-P` or `-I`; and a stranger's run can be there."""
    commands = [(place, ast.unparse(node)) for place, node in nodes(ast.List)]
    commands = [(place, command) for place, command in commands if command.startswith("[sys.executable,")]
    assert len(commands) >= 5
    for place, command in commands:
        assert command.split(", ")[1] in ("'-P'", "'-I'"), f"{place}: {command}"


def test_no_models_own_code_is_loaded_unless_the_setting_says_so() -> None:
    """transformers asks on standard input where a call leaves it open."""
    loads = [(place, call) for place, call in nodes(ast.Call) if LOADS.match(ast.unparse(call.func))]
    assert len(loads) >= 8
    for place, call in loads:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") in ("False", "trust_remote_code"), place


def private_names(file: Path, owners: frozenset[str] | None = None) -> set[str]:
    """Those that a file defines or assigns: functions, classes, variables and attributes, of these owners' alone."""
    found = set()
    for node in all_nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if owners is None or ast.unparse(node.value) in owners else set()
    return set(filter(PRIVATE.match, found))


def names_read(file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of what a file takes of others: attributes, imports, and what is replaced by its name."""
    for node in all_nodes(file):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            yield from ((node.lineno, text) for text in texts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PATH.fullmatch(node.value):
            yield node.lineno, node.value.rpartition(".")[2]


def test_no_test_reads_a_private_name_of_the_package() -> None:
    """What has no public name is tested by what it is for."""
    private = set().union(*map(private_names, SOURCE.rglob("*.py"))) - OTHERS
    assert len(private) > 500
    for file in Path(__file__).parent.rglob("*.py"):
        known = private - private_names(file, OWN)
        read = [f"{file}:{line}: {name}" for line, name in names_read(file) if name in known]
        assert not read, read


def test_the_root_holds_few_modules() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= MOST_ROOT_MODULES


def test_each_package_says_what_it_holds() -> None:
    for file in SOURCE.rglob("__init__.py"):
        assert len(ast.get_docstring(ast.parse(file.read_text())) or "") > 40, file


@pytest.mark.parametrize(("former", "today"), MOVED.items())
def test_module_paths_that_were_documented_still_work(former: str, today: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert importlib.import_module(former) is importlib.import_module(today)


def test_a_former_module_path_says_where_it_is_now() -> None:
    sys.modules.pop("estune.rewards.isolation", None)
    with pytest.warns(DeprecationWarning, match=r"estune\.grading\.isolation now: import it from there") as caught:
        importlib.import_module("estune.rewards.isolation")
    assert len(caught) == 1
