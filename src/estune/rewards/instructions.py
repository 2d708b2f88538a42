"""Checks of instructions that can be verified (IFEval, arXiv 2311.07911): 24 of its 25 kinds, by its names.

`language:response_language` is left out, as it takes a classifier. Sentences are split by a rule, for which IFEval has
a trained splitter, and a text in one case need not be English, which IFEval checks with langdetect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from estune.errors import EstuneError
from estune.grading.convention import share
from estune.rewards.text import Text, as_text

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}

_WORD = re.compile(r"\w+")
_HYPHENATED = re.compile(r"\w+(?:-\w+)*")
_PUNCTUATION = re.compile(r"[.,?!'\"]")
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
_ABBREVIATION = re.compile(
    r"Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|al|Inc|Ltd|Co|Corp|No|Vol|Fig|pp|p|a\.m|p\.m|U\.S|[A-Z]"
)
_LONGEST_MARKER = 50  # the time to look for one is its length times the text's
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@share
def instructions_reward(
    *,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
    **_: Any,
) -> list[float | None]:
    """The share of a prompt's instructions that the completion follows, from 0.0 to 1.0.

    Args:
        prompts: not read.
        completions: strings, or lists of messages of which the last is graded.
        instruction_id_list: for each completion, names of `CHECKS`.
        kwargs: for each of those, what it needs to know. Values of None are as if not there.

    Raises:
        EstuneError: an unknown name, or values that do not fit it.
    """
    rows = zip(completions, instruction_id_list, kwargs, strict=True)
    return [_share(followed(as_text(text), names, values)) for text, names, values in rows]


@share
def all_followed(
    *,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
    **_: Any,
) -> list[float | None]:
    """1.0 where the completion follows all of its prompt's instructions (IFEval's strict accuracy by prompt)."""
    rows = zip(completions, instruction_id_list, kwargs, strict=True)
    return [float(all(followed(as_text(text), names, values))) for text, names, values in rows]


def followed(text: str, names: Sequence[str], values: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each instruction is followed. An empty text follows none, as in IFEval.

    Raises:
        EstuneError: an unknown name, or values that do not fit it.
    """
    if len(names) != len(values):
        raise EstuneError(f"instructions: {len(names)} names but {len(values)} sets of values; give one each")
    return [_check(text, name, given) for name, given in zip(names, values, strict=True)]


def _check(text: str, name: str, given: Mapping[str, Any]) -> bool:
    if name not in CHECKS:
        raise EstuneError(f"instructions: {name} is not known; there are {', '.join(sorted(CHECKS))}; leave it out")
    values = {key: value for key, value in given.items() if value is not None}
    try:
        return bool(text.strip()) and CHECKS[name](text, **values)
    except (TypeError, ValueError) as error:
        raise EstuneError(f"instructions: {name} with {values}: {error}; mend the row") from error


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _named(name: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return register


def _compare(count: int, relation: str, limit: int) -> bool:
    """IFEval's two relations."""
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation {relation!r} is neither 'less than' nor 'at least'")
    return count < limit if relation == "less than" else count >= limit


def _count(word: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _sentences(text: str) -> int:
    """Sentences as Punkt, IFEval's splitter, finds them, but for rare abbreviations: at points, not at empty lines."""
    words = text.split()
    return sum(map(_ends_sentence, words[:-1])) + bool(words)


def _ends_sentence(word: str) -> bool:
    marked = word.rstrip("\"')]}")
    bare = marked.rstrip(".!?")
    return bare != marked and not (marked[len(bare) :] == "." and _ABBREVIATION.fullmatch(bare.lstrip("\"'([{")))


@_named("keywords:existence")
def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(word.lower() in text.lower() for word in keywords)


@_named("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_count(word, text) for word in forbidden_words)


@_named("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(text.lower().count(keyword.lower()), relation, frequency)


@_named("keywords:letter_frequency")
def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


@_named("length_constraints:number_words")
def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(_WORD.findall(text)), relation, num_words)


@_named("length_constraints:number_sentences")
def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(_sentences(text), relation, num_sentences)


@_named("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by `***`. Empty ones do not count at the ends, and are wrong elsewhere."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


@_named("length_constraints:nth_paragraph_first_word")
def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line. Empty ones count for `nth_paragraph`, not for `num_paragraphs`."""
    parts = [part.strip() for part in text.split("\n\n")]
    number = sum(map(bool, parts))
    if number != num_paragraphs or not 1 <= nth_paragraph <= number or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return _PUNCTUATION.split(word, 1)[0].lower() == first_word.lower()


@_named("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


@_named("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    """The marker is anywhere; IFEval's own two, with their points, may have a space in them."""
    if len(postscript_marker) > _LONGEST_MARKER:
        raise ValueError(f"postscript_marker has {len(postscript_marker)} characters, more than {_LONGEST_MARKER}")
    marker = postscript_marker.strip()
    return bool(re.search(_POSTSCRIPTS.get(marker) or re.escape(marker.lower()), text.lower()))


@_named("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    # Spaces of one line only: a bullet after many empty lines must not be looked for from each of them.
    return len(re.findall(r"^[^\S\n]*(?:\*[^*\n]|-)", text, re.MULTILINE)) == num_bullets


@_named("detectable_format:constrained_response")
def _constrained(text: str) -> bool:
    return any(option in text for option in _CONSTRAINED)


@_named("detectable_format:number_highlighted_sections")
def _highlighted(text: str, num_highlights: int) -> bool:
    found = [*re.findall(r"\*[^\n*]*\*", text), *re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(part.strip("*").strip()) for part in found) >= num_highlights


@_named("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """IFEval's own spelling of the name, which data sets have."""
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)) >= num_sections


@_named("detectable_format:json_format")
def _json(text: str) -> bool:
    body = re.sub(r"^```(?:json|JSON|Json)?|```$", "", text.strip()).strip()
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


@_named("detectable_format:title")
def _title(text: str) -> bool:
    """Something in double angular brackets, from the first to the last of them in a line."""
    return any(map(_line_has_title, text.split("\n")))


def _line_has_title(line: str) -> bool:
    start = line.find("<<")
    end = line.rfind(">>")
    return 0 <= start < end - 2 and bool(line[start:end].lstrip("<").rstrip(">").strip())


@_named("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_named("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Two different responses, separated by six stars."""
    parts = [part.strip() for part in text.split("******")]
    return all(parts[1:-1]) and len(found := [part for part in parts if part]) == 2 and found[0] != found[1]


@_named("startend:end_checker")
def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_named("startend:quotation")
def _quotation(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


@_named("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(sum(word.isupper() for word in _HYPHENATED.findall(text)), capital_relation, capital_frequency)


@_named("change_case:english_capital")
def _capital(text: str) -> bool:
    return text.isupper()


@_named("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    return text.islower()


@_named("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text
