"""A judge: a language model behind OpenAI's chat completions that scores completions by a rubric.

It is an `async` reward function: requests of all batches in flight wait at the same time, in the trainer's process,
while members generate. `rubric.py` makes questions and reads answers, `asking.py` asks.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from estune.errors import EstuneError
from estune.grading.convention import Row
from estune.rewards import rubric as rubrics
from estune.rewards.asking import Answer, Asker
from estune.rewards.text import listed, spelled

log = logging.getLogger(__name__)

_TRIAL = "Say hello."
_PER = 1e6  # a price is for so many tokens
_TAGS = frozenset(("prompt", "completion", "A", "B"))


def _values(value: Any) -> Any:
    return {key: spelled(item) for key, item in value.items()} if isinstance(value, Mapping) else value


class JudgeConfig(BaseModel):
    """Settings of a judge."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    name: str = Field("judge", description="what it is called in metrics", pattern=r"^[\w.-]+$")
    model: str = Field(description="the judge's model, as its server calls it")
    base_url: str | None = Field(
        None,
        description="where its server is, as http://localhost:8000/v1; the variable OPENAI_BASE_URL, or else OpenAI's, "
        "if not given",
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="the environment variable that holds the key; where it is not set, none is sent",
        pattern=r"^\w+$",
    )
    rubric: str = Field(description="what makes a completion good: a text, or the path of a file that holds it")
    columns: Annotated[list[str], BeforeValidator(listed)] = Field(
        [], description="columns that the judge is shown beside prompt and completion, such as a reference answer"
    )
    compare_to: str | None = Field(
        None,
        description="instead of a score: whether the completion is better than what this column holds; asked in both "
        "orders, 1 better, 0.5 as good, 0 worse, and their mean",
    )
    min_score: float = Field(0, description="the worst score of the scale, which becomes 0")
    max_score: float = Field(10, description="the best score of the scale, which becomes 1")
    failure_score: float | None = Field(
        None,
        ge=0,
        le=1,
        description="what a completion is worth where the judge answers without a score; if not given, that is an "
        "error, for which see reward_errors",
    )
    temperature: float | None = Field(0.0, ge=0, description="of the judge; null: not sent, for models that take none")
    request: Annotated[dict[str, JsonValue], BeforeValidator(_values)] = Field(
        {}, description="further fields of a request, as request.max_tokens=500, request.reasoning_effort=low"
    )
    timeout: float = Field(60.0, gt=0, description="seconds without an answer after which a request is tried again")
    max_retries: int = Field(5, ge=0, description="how often a request is tried again, with growing pauses")
    max_concurrency: int = Field(16, ge=1, description="requests at the same time")
    cache: str | None = Field(
        "auto",
        description="a file that keeps answers, so that none is paid for twice; null: none; auto is judge.sqlite in "
        "estune's folder in the user's cache",
    )
    prompt_price: float | None = Field(None, ge=0, description="price of a million tokens that the judge reads")
    completion_price: float | None = Field(None, ge=0, description="price of a million tokens that the judge writes")

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if self.min_score >= self.max_score:
            raise ValueError(f"min_score {self.min_score:g} is not below max_score {self.max_score:g}")
        taken = _TAGS.intersection((*self.columns, self.compare_to))
        if taken:
            raise ValueError(f"column {min(map(str, taken))} cannot be shown under this name: rename it")
        if not self.rubric.strip():
            raise ValueError("rubric is empty: say what makes a completion good")
        return self


def _nowhere(*_: Any, **__: Any) -> None:
    """Log nothing."""


class Judge:
    """An `async` reward function: scores from 0 to 1 that a model gives by a rubric.

    If the judge cannot be asked about a completion, an exception stands in the place of its score, which is an error of
    that completion alone. Metrics, summed over a step: `rewards/judge/prompt_tokens`, `completion_tokens`, `requests`,
    `cached` (questions answered from the cache), `no_score` and, if prices are given, `cost`. Records keep what the
    judge said, in a column `judge/answer`.

    Args:
        settings: settings of `JudgeConfig`; `model` and `rubric` must be given.

    Raises:
        EstuneError: for settings that cannot be used, or a rubric's file that is not there.
    """

    share = True

    def __init__(self, **settings: Any) -> None:
        try:
            self.config = config = JudgeConfig(**settings)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
            raise EstuneError(f"judge: {'; '.join(problems)}") from error
        self.__name__ = config.name
        self.rubric = _rubric(config.rubric)
        self._asker = Asker(config, lambda answer: self._read(answer) is not None)
        self._ready = False

    @property
    def definition(self) -> bytes:
        """Everything that scores depend on, except for what the judge's server does."""
        where = {"base_url", "api_key_env", "timeout", "max_retries", "max_concurrency", "cache"}
        settings = self.config.model_dump(exclude=where | {"prompt_price", "completion_price"})
        return json.dumps({**settings, "rubric": self.rubric}, sort_keys=True).encode()

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Refuse rows without a column that the judge is to be shown."""
        wanted = [*self.config.columns, *([self.config.compare_to] if self.config.compare_to else [])]
        missing = next((name for name in wanted if rows and name not in rows[0]), None)
        if missing is not None:
            raise EstuneError(
                f"row 0: the reward {self.__name__} is to show its judge the column {missing}; there are "
                f"{', '.join(rows[0])}"
            )

    def prepare(self) -> None:
        """Ask the judge once, so that a judge that cannot be asked is found before anything else is done.

        Raises:
            EstuneError: it cannot be reached or does not take the key or the model, or the cache cannot be opened.
        """
        if self._ready:
            return
        (question, *_) = self._questions(_TRIAL, "Hello!", dict.fromkeys(self._shown(), "Hello."))
        with ThreadPoolExecutor(1) as thread:  # a notebook has a loop of its own in this one
            answer = thread.submit(asyncio.run, self._try(self._body(question))).result()
        if answer:
            log.warning("judge %s: no score in its answer to a trial: %r", self.__name__, answer[:200])
        self._ready = True

    async def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Callable[..., None] = _nowhere,
        log_metric: Callable[..., None] = _nowhere,
        **columns: Any,
    ) -> list[float | Exception]:
        """The score of each completion, or the exception that says why there is none.

        Args:
            prompts: texts or conversations.
            completions: texts, or lists of one message.
            log_extra, log_metric: log answers and counts.
            columns: the data's columns, of which the judge is shown those that the settings name.
        """
        await self._asker.open()
        shown = [{name: columns[name][i] for name in self._shown()} for i in range(len(completions))]
        judged = await asyncio.gather(
            *(
                self._judge(self._questions(prompt, completion, more), log_metric)
                for prompt, completion, more in zip(prompts, completions, shown, strict=True)
            ),
            return_exceptions=True,
        )
        log_extra(f"{self.__name__}/answer", [None if isinstance(j, BaseException) else j[1] for j in judged])
        return [_score(found) for found in judged]

    def _shown(self) -> list[str]:
        """Names of the columns that a question shows."""
        compared = [self.config.compare_to] if self.config.compare_to else []
        return list(dict.fromkeys([*self.config.columns, *compared]))

    def _questions(self, prompt: Any, completion: Any, more: Mapping[str, Any]) -> list[rubrics.Messages]:
        """One question to score; two to compare, in both orders, so that a preference for the first cancels out."""
        config = self.config
        shown = {"prompt": prompt, **{name: more[name] for name in config.columns}}
        if config.compare_to is None:
            shown["completion"] = completion
            return [rubrics.to_score(self.rubric, shown, config.min_score, config.max_score)]
        other = more[config.compare_to]
        pairs = ({"A": completion, "B": other}, {"A": other, "B": completion})
        return [rubrics.to_compare(self.rubric, {**shown, **pair}) for pair in pairs]

    async def _judge(self, questions: Sequence[rubrics.Messages], log_metric: Any) -> tuple[float | EstuneError, str]:
        """The judge's score of a completion, or why there is none, and what it said."""
        answers = await asyncio.gather(*(self._asker.ask(self._body(question)) for question in questions))
        self._count(answers, log_metric)
        said = "\n\n".join(answer.text for answer in answers)
        scores = [self._read(answer) for answer in answers]
        found = [score for score in scores if score is not None]
        if len(found) == len(scores):
            # In the second order the completion is B.
            return (found[0] if len(found) == 1 else (found[0] + 1 - found[1]) / 2), said
        log_metric("no_score", 1, total=True)
        if self.config.failure_score is not None:
            return self.config.failure_score, said
        wrong = answers[scores.index(None)]
        why = "" if wrong.finished else "was cut off before its score: raise request.max_tokens: "
        return EstuneError(f"was answered by {self.config.model} without a score: {why}{wrong.text[-200:]!r}"), said

    def _read(self, answer: Answer) -> float | None:
        if not answer.finished:
            return None
        if self.config.compare_to is not None:
            return rubrics.preference_of(answer.text)
        return rubrics.score_of(answer.text, self.config.min_score, self.config.max_score)

    def _count(self, answers: Sequence[Answer], log_metric: Any) -> None:
        read = sum(answer.prompt_tokens for answer in answers)
        written = sum(answer.completion_tokens for answer in answers)
        asked = sum(answer.new for answer in answers)
        counts = {"prompt_tokens": read, "completion_tokens": written, "requests": asked}
        for name, number in {**counts, "cached": len(answers) - asked}.items():
            log_metric(name, number, total=True)
        prices = self.config.prompt_price, self.config.completion_price
        if any(price is not None for price in prices):
            cost = (read * (prices[0] or 0) + written * (prices[1] or 0)) / _PER
            log_metric("cost", cost, total=True)

    def _body(self, messages: rubrics.Messages) -> dict[str, Any]:
        """The body of a request."""
        config = self.config
        temperature = {} if config.temperature is None else {"temperature": config.temperature}
        return {"model": config.model, "messages": messages, **temperature, **config.request}

    async def _try(self, body: dict[str, Any]) -> str:
        """Ask with one retry at most; return the answer if there is no score in it, else an empty text."""
        try:
            answer = await self._asker.ask_once(body)
        except EstuneError as error:
            raise EstuneError(f"reward {self.__name__} {error}") from error
        return "" if self._read(answer) is not None else answer.text or "(nothing)"


def _score(found: tuple[float | EstuneError, str] | BaseException) -> float | Exception:
    if isinstance(found, Exception):
        return found
    if isinstance(found, BaseException):
        raise found  # the loop ends
    return found[0]


def _rubric(given: str) -> str:
    """A rubric's text, which may be in a file. A value without spaces must be a file's path."""
    path = Path(given).expanduser()
    if any(map(str.isspace, given)) and not os.path.isfile(path):
        return given
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EstuneError(
            f"judge: rubric {given}: it cannot be read as a file ({error}); give a sentence, or a file's path"
        ) from error
