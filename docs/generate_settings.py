"""Write docs/settings.md from the settings themselves; with --check, only say whether it is up to date."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from estune.config import Config, embedded_settings
from estune.tasks import KINDS

TARGET = Path(__file__).with_name("settings.md")
HEAD = """# Settings

<!-- Written by docs/generate_settings.py: `make docs` after changing a setting. -->

Every setting is an option of `estune train` (`--sigma 0.002`, `--task.eval_size 500`) and a key of a YAML or TOML file
given with `--config`. Options win over the file, and the file over the defaults. `estune train --dry-run` shows what a
run would use and refuses what training would; a key that does not exist is refused, with the nearest one that does.

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
    own = {name: field for name, field in Config.model_fields.items() if name != "task"}
    parts = [
        HEAD,
        _table(own, "", embedded),
        "Options of the tasks follow; see [tasks.md](tasks.md) for what they mean together.\n",
    ]
    for name, options in KINDS.items():
        embedded = {key: value for key, value in embedded_settings(name)["task"].items() if key != "name"}
        parts.append(f"\n## Task: {name}\n\n{options.summary[0].upper()}{options.summary[1:]}.\n")
        parts.append(_table(options.model_fields, "task.", embedded))
    return "\n".join(parts)


def _table(fields: Mapping[str, FieldInfo], prefix: str, embedded: Mapping[str, Any]) -> str:
    lines = ["| setting | default | `tiny` | what it is |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = _show(field.get_default(call_default_factory=True))
        other = _show(embedded[name]) if name in embedded else ""
        description = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{prefix}{name}` | {default} | {'' if other == default else other} | {description} |")
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    match value:
        case None:
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
