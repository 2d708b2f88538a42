"""Every reader of texts on long texts of every kind, for a process with a deadline.

What is linear reads all of them in seconds. What is quadratic takes minutes over each of those that it is bad at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from estune.rewards.answers import final_answer
from estune.rewards.conciseness import contains
from estune.rewards.countdown import answer_reward, format_reward
from estune.rewards.instructions import CHECKS
from estune.rewards.programs import extract_code
from estune.rewards.readable import is_formula, is_literal

LENGTH = 200_000
PIECES = [
    *("\n", " ", "\r", "\n ", "a", "a ", "1", "-", "*", "**", "*a", "<<a", "[a", "{", "(", '"', ".", '!"'),
    *(
        "```",
        "~~~\n",
        "```\n",
        "#",
        "answer is",
        "\\boxed{",
        "$",
        ":",
        "<answer>",
        "P.S.\n",
        "Section ",
        "***",
        "1+",
        "\ud800",
    ),
]
VALUES: dict[str, dict[str, Any]] = {
    "keywords:existence": {"keywords": ["a b", "\n\n-", "aaab"]},
    "keywords:forbidden_words": {"forbidden_words": ["a", "-", "aaab"]},
    "keywords:frequency": {"keyword": "aab", "frequency": 3, "relation": "at least"},
    "keywords:letter_frequency": {"letter": "a", "let_frequency": 3, "let_relation": "at least"},
    "length_constraints:number_words": {"num_words": 3, "relation": "at least"},
    "length_constraints:number_sentences": {"num_sentences": 3, "relation": "at least"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 3},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "::"},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "a"},
    "combination:two_responses": {},
    "startend:end_checker": {"end_phrase": "a"},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {"capital_frequency": 1, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}
"""For each check of an instruction, values that let it read all of a text."""


def readers() -> list[Callable[[str], Any]]:
    """Whatever reads a completion in the trainer's own process, and what graders read first."""
    assert VALUES.keys() == CHECKS.keys()
    return [
        *(lambda text, check=CHECKS[name], more=more: check(text, **more) for name, more in VALUES.items()),
        lambda text: answer_reward(prompts=[""], completions=[text], numbers=[[1]], target=[1]),
        lambda text: answer_reward(prompts=[""], completions=[f"<answer>{text}</answer>"], numbers=[[1]], target=[1]),
        lambda text: format_reward(prompts=["<think>"], completions=[text]),
        lambda text: contains(text, "a a b"),
        final_answer,
        extract_code,
        is_formula,
        is_literal,
    ]


def main() -> None:
    """Read them all."""
    for piece in PIECES:
        for read in readers():
            read(f"- {piece * (LENGTH // len(piece))}x")
    print("read")


if __name__ == "__main__":
    main()
