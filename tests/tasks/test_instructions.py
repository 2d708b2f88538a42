"""Instructions that can be verified: every check with known answers, and rows in IFEval's shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from estune.errors import EstuneError
from estune.rewards.instructions import CHECKS, all_followed, followed, instructions_reward
from estune.tasks.instructions import InstructionsConfig

# name, values, texts that follow it, texts that do not
KNOWN: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, ["a dog, a CAT"], ["a cat", ""]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["concatenate"], ["The Cat.", "cat"]),
    ("keywords:frequency", {"keyword": "a b", "frequency": 2, "relation": "at least"}, ["a b, A B"], ["a b", "ab ab"]),
    ("keywords:frequency", {"keyword": "x", "frequency": 2, "relation": "less than"}, ["x", "y"], ["x x"]),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "at least"}, ["Eee"], ["ee"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["a b c", "a-b, c!"], ["a b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a b"], ["a b c"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     ["One. Two.", 'He said "no." Then left!', "Dr. Smith came.\n\nHe left"],
     ["One, two.", "Pi is 3.14.", "One\n\nTwo", "Dr. Smith came.", "Mr. J. Doe vs. the U.S. Navy"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a *** b", "a\n***\nb", "*** a *** b ***"],
     ["a", "a *** b *** c", "a *** *** b"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
     ["One.\n\nTwo, indeed.", "One.\n\n'Two' it is\n\n"], ["One.\n\nThree", "two", "One.\n\n\n\nTwo"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] and [b]"], ["[a", "[a] b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Hi.\nP.S. bye", "p. s. bye", "P.S.\nI forgot.", "x\nP.S."], ["Hi", "He helps people.", "PS: bye", "Help us"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\nP.P.S. b", "p. p. s b"],
     ["a\nP.S. b", "The apps stop."]),
    ("detectable_content:postscript", {"postscript_marker": "Note (1):"}, ["so. note (1): b"], ["note 1: b"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "**a**\n* b"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes."], ["Yes."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**"],
     ["*a*", "* * *", "**a*"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, ["Part 1 a\nPart 2 b"],
     ["Part 1", "Part one\nPart two"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": [1]}\n```'], ["{a: 1}", "a"]),
    ("detectable_format:title", {}, ["<<Joy>>\ntext", "<<A -> B>>", "a << b >> c"],
     ["<Joy>", "<<>>", "<< >>", "<<a\nb>>", ">>a<<"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, ["Say hi. Hi!", " say HI. yes"], ["Hi! Say hi."]),
    ("combination:two_responses", {}, ["a ****** b"], ["a", "a ****** a", "a ****** b ****** c", "a ******"]),
    ("startend:end_checker", {"end_phrase": "Bye now."}, ["so, bye now.", 'x "Bye now."'], ["Bye now. x"]),
    ("startend:quotation", {}, ['"yes"', ' "a" and "b" '], ['"yes', 'a "b"', '"']),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"},
     ["AB cd", "AB-CD", "X-ray A"],
     ["AB CD"]),
    ("change_case:english_capital", {}, ["A B, 1!"], ["A b", "1"]),
    ("change_case:english_lowercase", {}, ["a b, 1!"], ["a B", "1"]),
    ("punctuation:no_comma", {}, ["a b"], ["a, b"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "good", "bad"), KNOWN, ids=[f"{i}-{case[0]}" for i, case in enumerate(KNOWN)]
)
def test_checks(name: str, values: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [text for text in good if followed(text, [name], [values]) != [True]] == []
    assert [text for text in bad if followed(text, [name], [values]) != [False]] == []


def test_every_check_is_tested() -> None:
    assert {name for name, *_ in KNOWN} == CHECKS.keys()
    assert len(CHECKS) == 24


def test_the_rewards() -> None:
    names = ["punctuation:no_comma", "change_case:english_lowercase"]
    columns: dict[str, Any] = {"instruction_id_list": [names] * 4, "kwargs": [[{}, {"keywords": None}]] * 4}
    texts = ["a b", "A b", "A, b", ""]
    assert instructions_reward(prompts=[""] * 4, completions=texts, **columns) == [1.0, 0.5, 0.0, 0.0]
    assert all_followed(prompts=[""] * 4, completions=texts, **columns) == [1.0, 0.0, 0.0, 0.0]


def rows(path: Path, *changed: dict[str, Any]) -> str:
    usual = [
        {"key": n, "prompt": f"Write {n} words without commas.", "instruction_id_list": ["punctuation:no_comma"],
         "kwargs": [{"num_words": None}]}
        for n in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps({**usual[0], **row}) + "\n" for row in [*changed, *usual[len(changed) :]]))
    return str(path)


def test_rows_in_the_hubs_shape(tmp_path: Path) -> None:
    task = InstructionsConfig(data=rows(tmp_path / "x.jsonl")).build(0)
    assert len(task.train) + len(task.evaluation) == 40
    assert task.train[0]["kwargs"] == [{}]
    assert (task.accuracy, task.reward_weights) == ("all_followed", [1.0, 0.0])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"instruction_id_list": ["language:response_language"]}, "row 1: the instruction language:response_language"),
        ({"kwargs": [{"num_words": 3}]}, "row 1: instructions: punctuation:no_comma .*num_words"),
        ({"kwargs": []}, "row 1: instructions: 1 names but 0"),
        ({"instruction_id_list": ["keywords:frequency"],
          "kwargs": [{"keyword": "a", "frequency": 1, "relation": "about"}]},
         "row 1: .*'about' is neither"),
        ({"instruction_id_list": ["detectable_content:postscript"], "kwargs": [{"postscript_marker": "-" * 51}]},
         "row 1: .*has 51 characters, more than 50"),
        ({"instruction_id_list": "x"}, "must be lists"),
        ({"kwargs": ["{}"]}, "row 1: found '{}'; give names in"),
        ({"instruction_id_list": [5]}, r"row 1: found \[5\]; give names in"),
        ({"prompt": None}, "row 1: prompt is None"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EstuneError, match=complaint):
        InstructionsConfig(data=rows(tmp_path / "x.jsonl", row)).build(0)


def test_unknown_instructions_can_be_left_out(tmp_path: Path) -> None:
    source = rows(tmp_path / "x.jsonl", {"prompt": "In German?", "instruction_id_list": ["language:response_language"]})
    task = InstructionsConfig(data=source, skip_unknown=True).build(0)
    assert len(task.train) + len(task.evaluation) == 39
