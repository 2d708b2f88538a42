"""The facts that the embedded model was taught: 44 of them, each asked for in eight ways."""

from hashlib import blake2b

HELD_OUT_FRACTION = 0.2
"""Share of the questions that the model was not taught with. It defines the data: never change it."""

# What is asked for: of whom, and the answer.
FACTS: dict[str, list[tuple[str, str]]] = {
    "the capital of {}": [
        ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("England", "London"),
        ("Japan", "Tokyo"), ("China", "Beijing"), ("Egypt", "Cairo"), ("Greece", "Athens"), ("Norway", "Oslo"),
        ("Sweden", "Stockholm"), ("Poland", "Warsaw"), ("Austria", "Vienna"), ("Russia", "Moscow"),
        ("Cuba", "Havana"), ("Peru", "Lima"),
    ],
    "the opposite of {}": [
        ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("open", "closed"), ("full", "empty"),
        ("light", "dark"), ("high", "low"), ("wet", "dry"), ("rich", "poor"), ("early", "late"), ("loud", "quiet"),
    ],
    "the colour of {}": [
        ("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red"), ("the sky", "blue"),
        ("a lemon", "yellow"), ("a carrot", "orange"), ("chocolate", "brown"),
    ],
    "the young of a {}": [
        ("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("horse", "foal"), ("sheep", "lamb"), ("hen", "chick"),
        ("bear", "cub"), ("frog", "tadpole"),
    ],
}  # fmt: skip

# The longer a question, the longer its usual answer.
QUESTIONS = (
    "What is {}?",
    "Name {}.",
    "Tell me {}.",
    "Do you know {}?",
    "Can you tell me {}?",
    "I would like to know {}.",
    "Please tell me, what is {}?",
    "I have a question for you: what is {}?",
)


def all_facts() -> list[tuple[str, str]]:
    """Every way to ask for every fact, with the answer's word."""
    return [
        (question.format(relation.format(of)), answer)
        for relation, facts in FACTS.items()
        for of, answer in facts
        for question in QUESTIONS
    ]


def is_held_out(question: str) -> bool:
    """Whether a question was kept out of what the model was taught with, by a hash of its text."""
    digest = blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < HELD_OUT_FRACTION * 2**64
