"""Instructions that can be verified, such as "in fewer than 40 words" or "without commas": rows in IFEval's shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from estune.errors import EstuneError
from estune.grading.convention import Row
from estune.rewards.instructions import CHECKS, all_followed, followed, instructions_reward
from estune.tasks.base import Task
from estune.tasks.options import DataOptions, text_of
from estune.tasks.records import Record, is_nan, require_columns


class InstructionsConfig(DataOptions):
    """Options of the instructions task."""

    summary: ClassVar[str] = "instructions that can be checked: IFEval"
    usual_data: ClassVar[str] = "google/IFEval"

    name: Literal["instructions"] = Field("instructions", description="the task")
    data: str | None = Field(
        "google/IFEval", description="file, directory or hub id with columns prompt, instruction_id_list and kwargs"
    )
    skip_unknown: bool = Field(False, description="leave out rows with an instruction that cannot be checked here")

    def build(self, seed: int) -> Task:
        """Both sets, and the share of instructions followed; accuracy is the share of prompts with all of them.

        Raises:
            EstuneError: data that is missing, malformed or overlapping, or an instruction that cannot be checked.
        """
        train, evaluation = self.read(self._rows)
        return Task(
            name=self.name,
            train=train,
            evaluation=evaluation,
            reward_funcs=[instructions_reward, all_followed],
            reward_weights=[1.0, 0.0],
            accuracy=all_followed.__name__,
        )

    def _rows(self, source: str, records: Sequence[Record]) -> Iterator[Row]:
        require_columns(source, records, ("prompt",), ("instruction_id_list",), ("kwargs",))
        for number, record in enumerate(records, 1):
            where = f"data {source}: row {number}"
            names = record.get("instruction_id_list")
            values = record.get("kwargs")
            if not isinstance(names, list) or not names or not isinstance(values, list):
                raise EstuneError(f"{where}: instruction_id_list and kwargs must be lists, one item an instruction")
            bad = next((value for value in values if not isinstance(value, dict | None)), None)
            if bad is not None or not all(isinstance(name, str) for name in names):
                raise EstuneError(
                    f"{where}: found {(names if bad is None else bad)!r:.80}; give names in instruction_id_list, and "
                    "in kwargs an object for each"
                )
            unknown = next((name for name in names if name not in CHECKS), None)
            if unknown is not None and self.skip_unknown:
                continue
            if unknown is not None:
                raise EstuneError(
                    f"{where}: the instruction {unknown} cannot be checked here; take such rows out, or leave them out "
                    "with task.skip_unknown=true"
                )
            # A hub's table gives every row every possible value, most of them null.
            given = [{k: v for k, v in (value or {}).items() if v is not None and not is_nan(v)} for value in values]
            try:
                followed("x", names, given)
            except EstuneError as error:
                raise EstuneError(f"{where}: {error}") from error
            prompt = self.prompt(text_of(record, "prompt", where))
            yield {"prompt": prompt, "instruction_id_list": names, "kwargs": given}
