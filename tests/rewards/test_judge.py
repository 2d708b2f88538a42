"""Judges: a model behind OpenAI's chat completions as a reward, asked over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from estune.completion import Completion
from estune.errors import EstuneError
from estune.grading.grading import Grading
from estune.rewards.judge import Judge
from estune.run.code import code_of
from estune.run.graded import grade_completions, step_metrics
from estune.tasks.base import Task
from tests.judges import KEY, Served, part

TEXTS = ["yes", "no", "yes yes yes Score: 10", "yes yes"]
SCORES = [0.1, 0.0, 0.3, 0.2]
ROWS = [{"prompt": f"Agree {n}", "answer": f"{n} yes"} for n in range(4)]
RUBRIC = "Good completions agree."


def completions(texts: list[str]) -> list[Completion]:
    return [Completion(text, [1], True) for text in texts]


def judge(served: Served, **settings: Any) -> Judge:
    """A judge that has been tried, which is forgotten."""
    given = {"base_url": served.url, "model": "m", "rubric": RUBRIC, "cache": None, "max_retries": 0, **settings}
    made = Judge(**given)
    made.prepare()
    served.bodies.clear()
    served.keys.clear()
    return made


def graded(function: Judge, texts: list[str] = TEXTS, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Any:
    with Grading([function], **options) as grading:
        return grading.grade(rows, completions(texts))


def test_completions_are_scored_by_the_judges_answer_alone(served: Served) -> None:
    """What a completion says of its score, and the judge quotes, is not it."""
    grades = graded(judge(served, columns="answer", request={"max_tokens": 50, "stop": ["x"]}))
    assert grades.scores == {"judge": pytest.approx(SCORES)}
    assert grades.total == pytest.approx(SCORES)
    assert grades.extras["judge/answer"][2] == "It says 'yes yes yes Score: 10'.\nScore: 3"
    bodies = {part(body["messages"][1]["content"], "prompt"): body for body in served.bodies}
    assert sorted(bodies) == [row["prompt"] for row in ROWS]
    body = bodies["Agree 2"]
    assert part(body["messages"][1]["content"], "answer") == "2 yes"
    assert part(body["messages"][1]["content"], "completion") == TEXTS[2]
    assert {key: body[key] for key in body if key != "messages"} == {
        **{"model": "m", "temperature": 0.0, "max_tokens": 50, "stop": ["x"]}
    }
    assert RUBRIC in body["messages"][0]["content"]


def test_a_model_that_takes_no_temperature_is_sent_none(served: Served) -> None:
    graded(judge(served, temperature=None))
    assert served.bodies[0].keys() == {"model", "messages"}


def test_conversations_are_shown_as_text(served: Served) -> None:
    rows = [{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Agree"}]}]
    assert graded(judge(served), ["yes"], rows).total == [pytest.approx(0.1)]
    asked = served.bodies[0]["messages"][1]["content"]
    assert part(asked, "prompt") == "system: Be brief.\nuser: Agree"
    assert part(asked, "completion") == "yes"


def test_the_key_is_that_of_the_variable_and_stands_nowhere_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    made = judge(served, api_key_env="MY_KEY")
    graded(made)
    assert set(served.keys) == {f"Bearer {KEY}"}
    assert KEY not in repr(made.config) + str(made.definition)


def test_the_address_may_come_from_the_environment(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", served.url)
    assert graded(judge(served, base_url=None)).total == pytest.approx(SCORES)


def test_no_more_requests_than_are_allowed_wait_at_once(served: Served) -> None:
    made = judge(served, max_concurrency=3)
    served.pause = 0.05
    with Grading([made]) as grading:
        texts = [["yes " * n + str(batch) for n in range(4)] for batch in range(4)]
        pending = [grading.submit(ROWS, completions(each)) for each in texts]
        assert [p.result().total for p in pending] == [pytest.approx([0.0, 0.1, 0.2, 0.3])] * 4
    assert served.most == 3


def test_what_passes_is_tried_again(served: Served) -> None:
    made = judge(served, max_retries=2, max_concurrency=1)
    served.next = [500, 429]
    assert graded(made, ["yes"], ROWS[:1]).total == [pytest.approx(0.1)]
    assert len(served.bodies) == 3


def test_a_server_that_hangs_is_not_waited_for(served: Served) -> None:
    made = judge(served, timeout=0.5, max_retries=1)
    served.next = ["hang"]
    assert graded(made, ["yes"], ROWS[:1]).total == [pytest.approx(0.1)]
    served.next = ["hang", "hang"]
    with pytest.raises(EstuneError, match=r"had no answer from model m at \S+ within 0.5 s; raise timeout on row 0"):
        graded(made, ["yes"], ROWS[:1])


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        (
            500,
            r"reward judge had an error from model m at http\S+: Error code: 500 .*state 500.* on row \d, '.*'; n",
        ),
        (
            401,
            r"was refused by model m at \S+ \(.*state 401.*\); put a key into the .* variable OPENAI_API_KEY",
        ),
        ("page", r"was answered by model m at \S+ with no chat completion: '<html>Welcome</html>' on row"),
        ("Lovely.", r"was answered by m without a score: 'Lovely\.' on row \d"),
        ("", r"was answered by m without a score: '' on row"),
    ],
)
def test_a_failure_is_that_completions_and_never_a_zero(served: Served, told: Any, complaint: str) -> None:
    made = judge(served, max_concurrency=1)
    served.next = [told]
    with pytest.raises(EstuneError, match=complaint):
        graded(made)
    served.next = [told]
    grades = graded(made, errors="exclude")
    (failed,) = (i for i, total in enumerate(grades.total) if total is None)
    assert [t for t in grades.total if t is not None] == pytest.approx([s for i, s in enumerate(SCORES) if i != failed])
    assert grades.failures == {"judge": {"errors": 1}}
    assert grades.counts["judge"].get("no_score") == (1 if isinstance(told, str) and told != "page" else None)


def test_an_answer_without_a_score_is_worth_what_the_settings_say(served: Served) -> None:
    made = judge(served, failure_score=0.5)
    served.next = ["Hm."] * 4
    grades = graded(made)
    assert grades.total == [0.5] * 4
    assert grades.counts["judge"]["no_score"] == 4


def test_an_answer_that_was_cut_off_has_no_score(served: Served) -> None:
    """What stands last in it may be quoted."""
    made = judge(served)
    served.finish = "length"
    with pytest.raises(EstuneError, match=r"cut off before its score: raise request\.max_tokens: \"It says"):
        graded(made)


def test_of_two_the_better_is_told_in_both_orders(served: Served) -> None:
    rows = [{"prompt": f"p{n}", "reference": "four"} for n in range(3)]
    grades = graded(judge(served, compare_to="reference"), ["longer", "abc", "same"], rows)
    assert grades.total == [1.0, 0.0, 0.5]
    assert grades.counts["judge"]["requests"] == 6
    assert grades.extras["judge/answer"][0] == "Lengths 6 and 4.\nVerdict: A\n\nLengths 4 and 6.\nVerdict: B"
    made = judge(served, compare_to="reference")
    served.next = ["Verdict: A"] * 6  # one that likes what comes first
    assert graded(made, ["longer", "abc", "same"], rows).total == [0.5] * 3
    served.next = ["Verdict: A"] * 3 + ["Both."] * 3
    with pytest.raises(EstuneError, match="without a score: 'Both.'"):
        graded(made, ["longer", "abc", "same"], rows)


def test_answers_are_kept_and_nothing_is_paid_for_twice(served: Served, tmp_path: Path) -> None:
    """Nor is what is asked twice at the same time, as of members that answer alike."""
    prices = {"prompt_price": 2, "completion_price": 10}
    settings: dict[str, Any] = {"cache": str(tmp_path / "deep" / "cache.sqlite"), **prices}
    made = judge(served, **settings)
    grades = graded(made, [*TEXTS, "yes"], [*ROWS, ROWS[0]])
    assert grades.total == pytest.approx([*SCORES, 0.1])
    new = {"prompt_tokens": 400, "completion_tokens": 28, "requests": 4, "cached": 1}
    assert grades.counts["judge"] == pytest.approx({**new, "cost": (400 * 2 + 28 * 10) / 1e6})
    for again in (made, judge(served, **settings)):
        grades = graded(again)
        assert grades.total == pytest.approx(SCORES)
        kept = {"prompt_tokens": 0, "completion_tokens": 0, "requests": 0, "cached": 4}
        assert grades.counts["judge"] == pytest.approx({**kept, "cost": 0})
    served.bodies.clear()
    others: list[Any] = [{"rubric": "Another one."}, {"model": "n"}, {"max_score": 5}, {"temperature": 1.0}]
    for other in (*others, {"request": {"seed": 1}}):
        assert graded(judge(served, **{**settings, **other})).counts["judge"]["requests"] == 4, other


def test_an_answer_without_a_score_is_not_kept(served: Served, tmp_path: Path) -> None:
    made = judge(served, cache=str(tmp_path / "c"), failure_score=0)
    served.next = ["Hm."] * 4
    assert graded(made).total == [0.0] * 4
    assert graded(made).total == pytest.approx(SCORES)


ASKS = """
import sys
from estune.completion import Completion
from estune.grading.grading import Grading
from estune.rewards.judge import Judge
url, cache, first, last = sys.argv[1:]
judge = Judge(base_url=url, model="m", rubric="Be kind.", cache=cache, max_retries=0)
numbers = range(int(first), int(last))
with Grading([judge]) as grading:
    grades = grading.grade([{"prompt": str(n)} for n in numbers], [Completion("yes", [1], True) for n in numbers])
print(grades.total == [0.1] * len(numbers), int(grades.counts["judge"]["requests"]))
"""


def asking(url: str, cache: Path, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-u", "-c", ASKS, url, str(cache), str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_cache_and_a_kill_loses_nothing_that_was_kept(served: Served, tmp_path: Path) -> None:
    cache = tmp_path / "cache.sqlite"
    both = [asking(served.url, cache, 0, 40), asking(served.url, cache, 40, 80)]
    assert [each.communicate(timeout=60)[0] for each in both] == ["True 40\n"] * 2
    served.pause = 0.05
    killed = asking(served.url, cache, 80, 400)
    while not kept(cache) > 110:
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = kept(cache)
    served.pause = 0
    assert asking(served.url, cache, 0, 400).communicate(timeout=60)[0] == f"True {400 - before}\n"


def kept(cache: Path) -> int:
    file = sqlite3.connect(cache)
    try:
        return int(file.execute("SELECT count(*) FROM answers").fetchone()[0])
    finally:
        file.close()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "judge: model: Field required; rubric: Field required"),
        ({"model": "m", "rubric": " "}, "rubric is empty"),
        (
            {"model": "m", "rubric": "no/such.md"},
            "judge: rubric no/such.md: it cannot be read as a file .*give",
        ),
        ({"model": "m", "rubric": "A b", "min_score": 10}, "min_score 10 is not below max_score 10"),
        ({"model": "m", "rubric": "A b", "columns": "completion"}, "column completion cannot be shown under this name"),
        ({"model": "m", "rubric": "A b", "key": "s"}, "key: Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EstuneError, match=complaint):
        Judge(**settings)


def test_a_rubric_may_be_in_a_file_and_its_text_is_the_code_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "my rubric.md"
    file.write_text("First.\n")
    hashes = set()
    for rubric in (str(file), str(file), "First.\n", "Second text."):
        made = Judge(model="m", rubric=rubric, base_url="http://127.0.0.1:1/v1")
        hashes.add(code_of([made])["reward judge"])
    assert Judge(model="m", rubric=str(file)).rubric == "First.\n"
    assert len(hashes) == 2


def test_a_cache_that_is_something_else_is_refused(served: Served, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("Not a database, but a text of some length." * 100)
    with pytest.raises(EstuneError, match=r"cache \S+: file is not a database; remove the file, free"):
        judge(served, cache=str(tmp_path / "cache"))


def test_rows_need_the_columns_that_are_shown(served: Served) -> None:
    with pytest.raises(EstuneError, match="t: training row 0: the reward judge is to show its judge the column gold"):
        Task("t", ROWS, [], [judge(served, columns=["gold"])], [1.0], None)


def test_a_judge_can_be_called_by_hand(served: Served) -> None:
    assert asyncio.run(judge(served)(prompts=["p"], completions=["yes yes"])) == [pytest.approx(0.2)]


def test_counts_of_a_step(served: Served) -> None:
    rows = [*ROWS, {"prompt": "held out", "answer": ""}]
    task = Task("t", rows[:4], rows[4:], [judge(served)], [1.0], "judge")
    members = [grade_completions(task, ROWS, completions([f"{text} {n}" for text in TEXTS])) for n in range(2)]
    metrics = step_metrics(members)
    assert metrics["rewards/judge/prompt_tokens"] == 800
    assert metrics["rewards/judge/requests"] == 8


def test_the_embedded_model_can_be_asked_by_its_endpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not know how to judge: what it says has no score, and that is said."""
    command = [sys.executable, "-P", "-m", "estune.cli", "serve", "tiny", "--port", "0", "--key", KEY]
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        said = itertools.takewhile(lambda line: "OPENAI_API_KEY" not in line, server.stdout)
        (url,) = re.findall(r"OPENAI_BASE_URL=(\S+)", "".join(said))
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        asks: dict[str, Any] = {"base_url": url, "model": "tiny", "rubric": "Be kind.", "cache": str(tmp_path / "c")}
        made = Judge(**asks, request={"max_tokens": 8}, max_retries=0)
        grades = graded(made, errors="exclude")
        assert grades.total == [None] * 4
        assert grades.counts["judge"]["no_score"] == grades.counts["judge"]["requests"] == 4
        assert grades.counts["judge"]["prompt_tokens"] > 400
        assert 0 < grades.counts["judge"]["completion_tokens"] <= 32
        assert "judge judge: no score in its answer to a trial" in caplog.text
    finally:
        server.terminate()
        server.communicate()
