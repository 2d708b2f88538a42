"""What README and docs say: links lead somewhere, commands parse, settings exist, Python compiles."""

import ast
import importlib.metadata
import inspect
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy.typing
import pytest
import typer
import yaml

import estune
from estune.cli import app
from estune.cli.options import overrides_of
from estune.config import RESUMABLE, Config, parse, read
from estune.config.names import MEANINGLESS
from estune.errors import EstuneError
from estune.tasks import KINDS
from estune.trl.config import MISSING, OWN, TAKEN
from estune.weights.adapters import Adapter

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench" / "README.md"],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
NAMES = {*Config.model_fields, *OWN, *MISSING, *TAKEN, *MEANINGLESS}
"""What ESConfig takes."""
PLACEHOLDERS = {"key", "OPTION", "NAME", "sweep.KEY"}
COMMANDS = typer.main.get_command(app)
OPTIONS = {name for command in COMMANDS.commands.values() for option in command.params for name in option.opts}  # type: ignore[attr-defined]
OPTIONS |= {"--help", "--version"}  # every command's
USAGE: type[Exception] = typer.BadParameter.__bases__[0]  # typer has a click of its own
TASK_OPTIONS = {name for options in KINDS.values() for name in options.model_fields}


@dataclass
class Block:
    """A block of code: the line where it starts, its language ("" if none is named) and its text."""

    line: int
    language: str
    text: str


@dataclass
class Page:
    """A page of Markdown, taken apart: its prose without code, its blocks of code and its spans of code."""

    prose: str = ""
    blocks: list[Block] = field(default_factory=list)

    @property
    def spans(self) -> list[str]:
        """What stands between backticks, line breaks as spaces."""
        return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", self.prose)]

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        text = re.sub(r"`[^`]*`", "", self.prose)
        named = re.findall(r"\]\(\s*([^)\s]+)[^)]*\)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M)
        return [*named, *re.findall(r"<(https?:[^>]*)>", text)]

    @property
    def anchors(self) -> set[str]:
        """What GitHub, and the site, call the headings."""
        found: list[str] = []
        for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", self.prose, re.M):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
        return {*found, *re.findall(r"""<a (?:id|name)=["']([^"']+)""", self.prose)}


def take_apart(text: str) -> Page:
    """Prose and blocks: between fences, or indented by four after an empty line."""
    page, prose = Page(), []
    block: Block | None = None
    fence = margin = previous = ""
    for number, line in enumerate(text.splitlines(), 1):
        if fence and block:
            if line.strip() == fence:
                block, fence = None, ""
            else:
                block.text += line.removeprefix(margin) + "\n"
        elif start := re.match(r"( *)(`{3,})(\w*)", line):
            margin, fence, block = start[1], start[2], Block(number, start[3], "")
            page.blocks.append(block)
        elif line.startswith("    ") and (block or not previous.strip()):
            if block is None:
                block = Block(number, "indented", "")
                page.blocks.append(block)
            block.text += line[4:] + "\n"
        else:
            block = block if not line.strip() else None
            prose.append(line)
        previous = line
    page.prose = "\n".join(prose)
    return page


@cache
def opened(path: Path) -> Page:
    return take_apart(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("path", PAGES, ids=name)


def broken(path: Path) -> Iterator[str]:
    """Links of a page that lead nowhere."""
    for link in opened(path).links:
        if re.match(r"[a-z]+:", link):
            url = urlsplit(link)
            if url.scheme not in ("http", "https") or not re.fullmatch(r"[\w.-]+\.[a-z]{2,}(:\d+)?", url.netloc):
                yield f"{link}: not an address"
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / unquote(file)).resolve() if file else path
        if not target.exists() or not target.is_relative_to(ROOT):
            yield f"{link}: no such file"
        elif anchor and (target.suffix != ".md" or anchor not in opened(target).anchors):
            yield f"{link}: no such heading"


def command_lines(page: Page) -> Iterator[str]:
    """Lines of shell that call estune: in blocks of no language or of a shell's."""
    for block in page.blocks:
        if block.language in ("indented", "", "sh", "bash", "shell", "console"):
            for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
                if found := re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/bin/)?(estune .*)", line):
                    yield found[1]


def complaint(line: str, *, whole: bool) -> str | None:
    """What the command line would say to this one; `whole`: nothing may be missing."""
    try:
        words = shlex.split(line, comments=True)[1:]
    except ValueError as error:
        return str(error)
    if not words or words[0].startswith("-"):
        return None
    command = COMMANDS.commands.get(words[0])  # type: ignore[attr-defined]
    if command is None:
        return f"no command {words[0]}"
    context = command.context_class(command, **command.context_settings)
    try:
        given, rest, _ = command.make_parser(context).parse_args(words[1:])
    except USAGE as error:
        return None if not whole and "requires an argument" in str(error) else str(error)
    missing = [option.name for option in command.params if option.required and given.get(option.name) is None]
    if whole and missing:
        return f"{', '.join(missing)} missing"
    whole = whole and words[0] != "eval" and not given.get("config")  # those go on top of others
    return wrong_settings(rest, resumed=bool(given.get("resume")), whole=whole)


def wrong_settings(words: list[str], *, resumed: bool, whole: bool) -> str | None:
    """What is wrong with settings given as options."""
    try:
        overrides = overrides_of(words)
        for override in overrides:
            key, _, value = override.partition("=")
            if key.replace("-", "_").startswith("sweep."):
                continue
            if resumed and key not in RESUMABLE:
                return f"{key} cannot be changed on resuming"
            if re.fullmatch(r"[A-Z]+", value) or not whole:  # stands for a value
                if not is_setting(key):
                    return f"no setting {key}"
                overrides = [other for other in overrides if other != override]
        swept = [override.split(",")[0].split("..")[0] for override in overrides]
        parse(read(None, [re.sub(r"^sweep[.]", "", override) for override in swept]))
    except EstuneError as error:
        return str(error)
    return None


def is_setting(key: str) -> bool:
    """Whether this is a setting of training, or begins one: `task`, `task.options.min_terms`."""
    first, *rest = key.replace("-", "_").removeprefix("sweep.").split(".")
    known = {"task": TASK_OPTIONS | PLACEHOLDERS, "adapter": set(Adapter.model_fields)}
    return first in Config.model_fields and (not rest or rest[0] in known.get(first, set()))


@every_page
def test_links_lead_somewhere(path: Path) -> None:
    assert not list(broken(path))


@every_page
def test_commands_parse(path: Path) -> None:
    page = opened(path)
    lines = [(line, True) for line in command_lines(page)]
    lines += [(code, False) for code in page.spans if code.startswith("estune ") and not code.endswith("...")]
    wrong = [f"{line}: {what}" for line, whole in lines if (what := complaint(line, whole=whole))]
    assert not wrong


def unknown(code: str) -> bool:
    """Whether a span of code is about an option or a setting that there is none of."""
    if code.startswith(("--", "estune ")):
        for option in re.findall(r"(?:^| )--([\w.-]+)", code):
            if not (is_setting(option) or f"--{option}" in OPTIONS or option in PLACEHOLDERS):
                return True
    if found := re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*): ([\w.]+)", code):  # as in a config file
        return wrong_settings([f"{found[1]}={found[2]}"], resumed=False, whole=True) is not None
    if found := re.fullmatch(r"([a-z_]+)=(\S+)", code):  # as ESConfig and estune's errors say it
        return found[1] not in NAMES | PLACEHOLDERS
    return False


@every_page
def test_options_and_settings_in_prose_exist(path: Path) -> None:
    spans = opened(path).spans
    if path.parent.name == "bench":  # its options are those of scripts
        spans = [code for code in spans if not code.startswith("--")]
    assert [code for code in spans if unknown(code)] == []


@every_page
def test_python_compiles_and_imports_what_there_is(path: Path) -> None:
    for block in opened(path).blocks:
        if block.language in ("python", "py"):
            tree = ast.parse(block.text, f"{path.name}:{block.line}")
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "estune":
                    module = importlib.import_module(node.module or "")
                    assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_the_task_of_one_s_own_is_the_example_that_was_trained_on(page: str) -> None:
    blocks = [block.text for block in opened(ROOT / page).blocks]
    assert (ROOT / "examples" / "sums.py").read_text() in blocks


def test_the_corpus_level_task_is_the_example_that_was_trained_on() -> None:
    blocks = [block.text for block in opened(ROOT / "docs" / "rewards.md").blocks]
    assert (ROOT / "examples" / "micro_f1.py").read_text() in blocks


@every_page
def test_settings_in_yaml_are_settings(path: Path) -> None:
    for block in opened(path).blocks:
        if block.language == "yaml":
            parse(yaml.safe_load(block.text), f"{path.name}:{block.line}")


def missing_extras(text: str) -> set[str]:
    """Extras that a text has people install, and that the package lacks."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"estune\[([\w,]+)\]", text)
    return {extra for group in named for extra in group.split(",")} - set(extras)


@every_page
def test_extras_are_those_of_the_package(path: Path) -> None:
    assert missing_extras(path.read_text(encoding="utf-8")) == set()


def test_extras_that_errors_name_are_those_of_the_package() -> None:
    sources = sorted((ROOT / "src").rglob("*.py"))
    found = {name(path): missing_extras(path.read_text(encoding="utf-8")) for path in sources}
    assert {path: extras for path, extras in found.items() if extras} == {}


def test_the_reference_has_every_public_name() -> None:
    told = set(re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.M))
    assert {f"estune.{public}" for public in estune.__all__} <= told
    for path in told:
        module, _, attribute = path.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), path


def referenced() -> dict[Any, str]:
    """What the reference describes, and under which name."""
    told = re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.M)
    return {getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]): path for path in told}


def classes_in(hint: Any) -> Iterator[type]:
    """Classes of ours in a type hint."""
    if inspect.isclass(hint) and hint.__module__.startswith("estune."):
        yield hint
    for part in typing.get_args(hint):
        yield from classes_in(part)


def test_the_reference_has_what_its_functions_take_and_return() -> None:
    known = referenced()
    for described, path in known.items():
        if inspect.isfunction(described) or is_dataclass(described):
            hints = typing.get_type_hints(described, localns={"np": numpy, "npt": numpy.typing}).values()
            assert not {found for hint in hints for found in classes_in(hint)} - known.keys(), path


@every_page
def test_the_reference_has_the_functions_that_pages_name(path: Path) -> None:
    known = referenced()
    for code in opened(path).spans:
        if found := re.match(r"(estune(?:\.\w+)+)\.(\w+)", code):
            named = getattr(importlib.import_module(found[1]), found[2], None)
            assert not inspect.isfunction(named) or named in known, code


def test_what_is_published_has_no_link_into_the_repository() -> None:
    description = importlib.metadata.metadata("estune").get_payload()
    assert "# estune" in description
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert len(targets) >= 2
    assert all(re.match("https?://", target) for target in targets)


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= listed


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("estune trane", "no command"),
        ("estune train --sigmma 0.1", "did you mean sigma"),
        ("estune train --sigma large", "sigma"),
        ("estune train --task countdwon", "did you mean countdown"),
        ("estune train --task.countt 3", "did you mean task.count"),
        ("estune train --resume runs/x --sigma 0.1", "cannot be changed"),
        ("estune replay runs/x --stepp 3 -o d", "No such option"),
        ("estune replay runs/x --step 3", "output missing"),
        ("estune train --task gym:sudoku --steps N --workers 2 --worker-timeout 60", None),
    ],
)
def test_wrong_commands_are_found(line: str, what: str | None) -> None:
    found = complaint(line, whole=True)
    assert found is None if what is None else what.lower() in str(found).lower()


@pytest.mark.parametrize("code", ["--sigmma", "--task.countt 3", "sigmma: 0.1", "sigma: large", "sigmma=0.1"])
def test_unknown_settings_are_found(code: str) -> None:
    assert unknown(code)


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# Some heading, long\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n[a](other.md#some-heading-long) [b](#a) [c](https://a.org/b) `[d](none.md)`\n"
        "[e](none.md) [f](other.md#b) [g](#c) [h](https://a) ![i](none.png) [j](../x.md)\n\n    [k](none.md)\n"
    )
    assert [message[0] for message in broken(page)] == ["n", "o", "#", "h", "n", "."]
