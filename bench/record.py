"""Record what a run of the embedded model shows on a terminal, as SVG: the last of the display, and the summary.

    python -m bench.record -o docs/images/run.svg [KEY=VALUE ...]

Nothing in the picture is fetched from elsewhere: who looks at it has it drawn in a font of their own.
"""

import argparse
import contextlib
import io
import re
import tempfile
from pathlib import Path

from rich.console import Console

from estune import Trainer
from estune.config import load
from estune.run.monitors.base import Plan, Summary
from estune.run.monitors.console import ConsoleMonitor


class Recorded(ConsoleMonitor):
    """The display, of whose many frames the last alone is recorded."""

    def on_train_begin(self, plan: Plan) -> None:
        super().on_train_begin(plan)
        self.console.record = False

    def on_train_end(self, summary: Summary) -> None:
        self.console.record = True
        super().on_train_end(summary)


def record(output: Path, settings: list[str]) -> None:
    console = Console(record=True, force_terminal=True, width=100, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        config = load(overrides=[*settings, "output_dir=runs/countdown"])
        Trainer(config, monitors=[Recorded(console)]).train()
    svg = console.export_svg(title="estune train", unique_id="run")
    output.write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.S), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images/run.svg"))
    arguments = parser.parse_args()
    record(arguments.output.resolve(), arguments.settings)
    print(arguments.output)


if __name__ == "__main__":
    main()
