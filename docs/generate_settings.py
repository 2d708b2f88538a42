"""Write docs/settings.md from the settings and the commands; with --check, only say whether it is up to date."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from estune.cli import app
from estune.config import SECTIONS, embedded_settings
from estune.tasks import KINDS

TARGET = Path(__file__).with_name("settings.md")
HEAD = """# Settings

<!-- Written by docs/generate_settings.py: `make docs` after changing a setting. -->

Every setting is an option of `estune train` (`--sigma 0.002`, `--task.eval_size 500`) and a key of a YAML or TOML file
given with `--config`. Options win over the file, and the file over the defaults. `estune train --dry-run` shows what a
run would use and refuses what training would. A key that does not exist is refused: a name of TRL's, verl's, Unsloth's,
prime-rl's or the paper's scripts with what stands for it here, a slip of the pen with the key that was meant.

An option's value takes the type of its setting: `--model 123` is a name, `--steps true` an error. A switch can stand
alone (`--mirrored`), and `null` stands for a setting that is not given.

```yaml
# my.yaml: estune train --config my.yaml --seed 1
model: Qwen/Qwen2.5-0.5B-Instruct
sigma: 0.001
task:
  name: countdown
  data: my_problems.jsonl
```

Defaults are the paper's (arXiv 2509.24372). The column `tiny` holds what replaces them when the model is the embedded
one, which is a thousand times smaller.
"""


def main() -> int:
    """Write the page, or check it; returns the exit code."""
    page = render()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page:
        return 0
    print(f"{TARGET.name} does not match the settings: run `make docs` and commit the result")
    return 1


def render() -> str:
    """The page."""
    embedded = embedded_settings()
    parts = [
        HEAD,
        *(
            f"## {section.__name__}\n\n{section.__doc__}\n\n{_table(section.model_fields, '', embedded)}"
            for section in SECTIONS
        ),
        "Below are the options of each task, for which see [tasks.md](tasks.md), and then those of the\n"
        "[commands](#commands).\n",
    ]
    for name, options in KINDS.items():
        embedded = {key: value for key, value in embedded_settings(name)["task"].items() if key != "name"}
        parts.append(f"\n## Task: {name}\n\n{options.summary[0].upper()}{options.summary[1:]}.\n")
        parts.append(_table(options.model_fields, "task.", embedded))
    parts.append(_commands())
    return "\n".join(parts)


def _commands() -> str:
    """What each command takes beside settings."""
    lines = [
        "\n## Commands\n",
        "`train`, `eval`, `estimate`, `probe`, `sweep` and `compare` take settings as well.\n",
        "| command | option | what it is |",
        "|---|---|---|",
    ]
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        lines.append(f"| **{name}** | | {_cell(command.help.split(chr(10) * 2)[0])} |")
        for option in command.params:
            if option.param_type_name == "argument":
                shown = option.name.upper()
            else:
                shown = ", ".join(sorted(option.opts, key=len, reverse=True))
            if option.name != "help":
                lines.append(f"| | `{shown}` | {_cell(option.help or '')} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that a cell of a table takes: on one line, outside of code no tags."""
    text = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", text)


def _table(fields: Mapping[str, FieldInfo], prefix: str, embedded: Mapping[str, Any]) -> str:
    lines = ["| setting | default | `tiny` | what it is |", "|---|---|---|---|"]
    return "\n".join([*lines, *_lines(fields, prefix, embedded)]) + "\n"


def _lines(fields: Mapping[str, FieldInfo], prefix: str, embedded: Mapping[str, Any]) -> list[str]:
    """A line of the table for each setting; those of a section that may be given follow it."""
    lines = []
    for name, field in fields.items():
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        default = _show(getattr(value, "name", value) if name == "task" else value)
        other = _show(embedded[name]) if name in embedded and name != "task" else ""
        description = _cell(field.description or "")
        lines.append(f"| `{prefix}{name}` | {default} | {'' if other == default else other} | {description} |")
        section, *rest = get_args(field.annotation) or (None,)
        if rest == [type(None)] and isinstance(section, type) and issubclass(section, BaseModel):
            lines += _lines(section.model_fields, f"{prefix}{name}.", {})
    return lines


def _show(value: Any) -> str:
    match value:
        case None | "":
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case tuple():
            return f"`{'-'.join(map(str, value))}`"
        case dict():
            return f"`{value}`" if value else ""
        case list():
            return f"`[{', '.join(map(str, value))}]`"
        case _:
            return f"`{value}`"


if __name__ == "__main__":
    sys.exit(main())
