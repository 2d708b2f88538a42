"""Code: write a program that passes its tests. Rows in the shape of MBPP, of HumanEval, or with a column `tests`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from estune.errors import EstuneError
from estune.grading.convention import Row
from estune.rewards.code import unit_tests, unsealed_tests
from estune.rewards.programs import tests_of, text_list, with_function
from estune.tasks.base import Task
from estune.tasks.options import DataOptions, text_of
from estune.tasks.records import Record, require_columns

log = logging.getLogger(__name__)

_PROBLEMS = ("text", "prompt", "problem", "question")
_TESTS = ("tests", "input_output")

INSTRUCTION = "Answer with the whole program in one Python code block."


class CodeConfig(DataOptions):
    """Options of the code task."""

    summary: ClassVar[str] = "programs that pass unit tests: MBPP and HumanEval"
    usual_data: ClassVar[str] = "google-research-datasets/mbpp, openai/openai_humaneval"

    name: Literal["code"] = Field("code", description="the task")
    data: str | None = Field(
        "google-research-datasets/mbpp:full",
        description="file, directory or hub id; columns as MBPP's (text or prompt, test_list, code), HumanEval's "
        "(prompt, test, entry_point, canonical_solution), or problem, tests, and optionally setup and solution",
    )
    eval_data: str | None = Field(
        "openai/openai_humaneval", description="as `data`, to evaluate on; several with commas between"
    )
    instruction: str = Field(INSTRUCTION, description="what follows each problem in the prompt")

    packages: str = Field(
        "", description="installed packages that programs may import beside the standard library; commas between"
    )

    def build(self, seed: int) -> Task:
        """Both sets, and 1 for a program that passes all tests. How many tests can be forged is logged, if any can.

        Raises:
            EstuneError: data that is missing, malformed or overlapping.
        """
        train, evaluation = self.read(self._rows)
        for side, rows in (("training", train), ("evaluation", evaluation)):
            unsealed, tests = unsealed_tests(rows)
            if unsealed:
                log.warning(
                    "task %s: %d of %d %s tests run where the program could forge their pass: see docs/security.md",
                    *(self.name, unsealed, tests, side),
                )
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=[unit_tests],
            reward_weights=[1.0],
            accuracy=unit_tests.__name__,
            gold=lambda row: block(row["solution"]) if row["solution"] else None,
        )

    def _rows(self, source: str, records: Sequence[Record]) -> Iterator[Row]:
        human_eval = "entry_point" in records[0]
        names = (("prompt",), ("test",)) if human_eval else (_PROBLEMS, ("test_list", *_TESTS))
        problem, tests = require_columns(source, records, *names)
        packages: Any = [name.strip() for name in self.packages.split(",") if name.strip()]
        for number, record in enumerate(records, 1):
            where = f"data {source}: row {number}"
            if human_eval:
                text, columns = _human_eval(record, where)
            elif tests == "test_list":
                text, columns = _mbpp(record, problem, where)
            else:
                text, columns = _own(record, problem, tests, where)
            # All columns in all rows, so that one shape can be trained on and the other evaluated.
            empty = dict.fromkeys(("test", "entry_point", "code_prompt", "test_list", "test_setup_code", "solution"))
            if packages:
                empty["packages"] = packages
            yield {"prompt": self.prompt(f"{text}\n\n{self.instruction}".strip()), **empty, **columns}


def block(code: str) -> str:
    """Code as a model should write it."""
    return f"```python\n{code.strip()}\n```"


def _human_eval(record: Record, where: str) -> tuple[str, dict[str, Any]]:
    """A row of HumanEval: the prompt is a function's head, which the solution continues; the tests define `check`."""
    head = text_of(record, "prompt", where)
    solution = record.get("canonical_solution")
    return f"Complete this function.\n\n{block(head)}", {
        "test": text_of(record, "test", where),
        "entry_point": text_of(record, "entry_point", where),
        "code_prompt": head,
        "solution": f"{head}{solution}" if solution else None,
    }


def _mbpp(record: Record, problem: str, where: str) -> tuple[str, dict[str, Any]]:
    """A row of MBPP: the model is shown a sentence and the assertions, which tell the function's name."""
    try:
        tests = text_list(record.get("test_list"), "test_list")
        imports = text_list(record.get("test_imports") or [], "test_imports")
    except EstuneError as error:
        raise EstuneError(f"{where}: {error}") from error
    if not tests:
        raise EstuneError(f"{where}: test_list is {tests!r}; give a list of assertions")
    lines = "\n".join(tests)
    return f"{text_of(record, problem, where).strip()}\nIt has to pass:\n\n{block(lines)}", {
        "test_list": tests,
        "test_setup_code": record.get("test_setup_code") or "\n".join(imports),
        "solution": record.get("code") or None,
    }


def _own(record: Record, problem: str, tests: str, where: str) -> tuple[str, dict[str, Any]]:
    """A row with a column `tests`: the model is shown a sentence, and assertions or the function's name."""
    columns = {
        "tests": with_function(record.get(tests), record.get("metadata")),
        "setup": record.get("setup") or "",
        "solution": record.get("solution"),
    }
    try:
        found = tests_of(columns)
    except EstuneError as error:
        raise EstuneError(f"{where}: {error}") from error
    text = text_of(record, problem, where).strip()
    if not found.asserts and not found.pairs:
        raise EstuneError(f"{where}: {tests} is {columns['tests']!r:.80}; give at least one test")
    if found.asserts:
        lines = "\n".join(found.asserts)
        return f"{text}\nIt has to pass:\n\n{block(lines)}", columns
    name = found.pairs[0].function
    told = f"The function is `{name}`." if name else "It reads standard input and writes to standard output."
    return f"{text}\n{told}", columns
