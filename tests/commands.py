"""A process that runs commands of estune, one a line, each in a folder: `python -m tests.commands`.

It is asked by JSON, FOLDER and ARGUMENTS in a list, and answers by it: the exit code, and what was printed and logged.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from estune import cli


def main() -> None:
    asked, answers = sys.stdin, sys.stdout
    sys.stdin = open(os.devnull)  # noqa: SIM115
    for line in asked:
        folder, *arguments = json.loads(line)
        os.chdir(folder)
        sys.argv = ["estune", *arguments]
        code: object = 0
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        print(json.dumps([code, out.getvalue(), error.getvalue()]), file=answers, flush=True)


if __name__ == "__main__":
    main()
