"""The command line: each command where its group is, and what ends it. Heavy imports wait until a command runs.

- `runs.py`: train, eval, ensemble, replay
- `journals.py`: log, verify, diff, branch, merge, pack, swap, sign, push, pull
- `chat.py`: chat
- `serve.py`: serve
- `studies.py`: probe, sweep, compare, report
- `estimate.py`: estimate
- `lists.py`: tasks, settings
- `options.py`, `output.py`: what they share
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from estune import __version__
from estune.cli import chat, estimate, journals, lists, runs, serve, studies
from estune.cli.signals import spared_imports, terminable
from estune.errors import EstuneError, printable, printable_lines
from estune.files import clear_temporary, explained

__all__ = ["app", "main"]

INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
UsageError: Any = typer.BadParameter.__base__  # has no name in typer

app = typer.Typer(
    help=(
        "Fine-tune all weights of a language model with Evolution Strategies: for any reward, with inference alone.\n\n"
        "`estune train` without options teaches the embedded model Countdown in two minutes. Every setting is an "
        "option (`--sigma 0.01`, `--task.eval_size 500`) and a key of the config file; `estune train --help` lists "
        "them. `estune --version` tells the version."
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("train", context_settings=SETTINGS, cls=lists.WithSettings)(runs.train)
app.command("eval", context_settings=SETTINGS)(runs.evaluate)
app.command("ensemble", context_settings=SETTINGS)(runs.ensemble)
app.command("chat", context_settings=SETTINGS)(chat.chat)
app.command("serve", context_settings=SETTINGS)(terminable()(serve.serve))
app.command("replay")(runs.replay)
app.command("log")(journals.log)
app.command("verify")(journals.verify)
app.command("diff")(journals.diff)
app.command("branch", context_settings=SETTINGS)(journals.branch)
app.command("merge")(journals.merge)
app.command("pack")(journals.pack)
app.command("swap")(journals.swap)
app.command("sign")(journals.sign)
app.command("push")(journals.push)
app.command("pull")(journals.pull)
app.command("report")(studies.report)
app.command("probe", context_settings=SETTINGS)(studies.probe)
# These two ask their children to end, and wait for them, before they end by SIGTERM; as `serve` removes its checkpoint.
app.command("sweep", context_settings=SETTINGS)(terminable()(studies.sweep))
app.command("compare", context_settings=SETTINGS)(terminable()(studies.compare))
app.command("estimate", context_settings=SETTINGS)(estimate.estimate)
app.command("tasks")(lists.tasks)
app.command("settings")(lists.settings)


def main() -> None:
    """Run the command line.

    What the user can mend ends in one line, with exit code 1, or 2 where it is the command line itself.
    """
    _open_streams()
    # Where JSON is asked for, nothing else may come to standard output.
    handler = RichHandler(console=Console(stderr="--json" in sys.argv), show_path=False)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    _log_once()
    try:
        clear_temporary()
        with spared_imports():
            if "--version" in sys.argv:
                print(f"estune {__version__}")
                return
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except EstuneError as error:
        code = _refuse(str(error), 1)
    except OSError as error:  # a full disk, a folder that may not be written
        code = _refuse(explained(error), 1)
    except UsageError as error:
        hint = " A run goes on by `estune train --resume RUN`." if sys.argv[1:2] == ["resume"] else ""
        code = _refuse(error.format_message() + hint, 2)
    except KeyboardInterrupt:  # at the very end: what comes before typer has made a code of
        code = INTERRUPTED
    except typer.Abort:  # the end of an input that was asked for
        code = 1
    if code == INTERRUPTED:
        # A member may still be generating in a thread, which Python would wait for. The journal is whole at any time.
        _refuse("interrupted", code)
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


class _Printable(logging.Formatter):
    """Messages name what stands in files of others, such as journals: no such name moves the terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def _log_once() -> None:
    """Leave the warnings of libraries that print them, and pass them on as well, to our handler alone."""
    for name in ("huggingface_hub", "datasets"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.addHandler = lambda hdlr: None  # type: ignore[method-assign]  # they add theirs when they are imported


def _open_streams() -> None:
    """Make standard streams fit for what comes: any character, and none that is closed.

    Where one is (`<&-`), the next file that is opened would get its number, and children would take it for the stream.
    Python has None for it, of which rich's logging makes an error at the first warning.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream, otherwise in (
        (sys.stdin, "replace"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=otherwise)


def _refuse(why: str, code: int) -> int:
    line = Text.assemble(("error: ", "bold red"), printable(" ".join(why.splitlines())))
    Console(stderr=True).print(line, soft_wrap=True)
    return code
