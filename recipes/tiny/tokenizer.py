"""The tokenizer: bytes, a few merges, and whole tokens for what the tasks repeat word for word."""

import json
import random
from math import exp

from recipes.tiny import chat, countdown
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from estune.tasks import countdown_problems as prompt
from estune.tasks.countdown_problems import Problem

BASE_SIZE = 512
END_OF_TURN, PADDING = "<|im_end|>", "<|endoftext|>"

# One token each, longest match first: the fixed sentences of the Countdown prompt cost 3 tokens instead of about 110,
# and numbers of two digits one token instead of two.
PHRASES = [
    "<think>", "</think>", "<answer>", "</answer>", "</think>\n<answer>", ", ",
    prompt.OPENING, prompt.MIDDLE, prompt.CLOSING,
    *map(str, range(10, 100)),
]  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(seed: int) -> Qwen2Tokenizer:
    """Merges are learned from the corpus, so that its words are a token or two each."""
    rng = random.Random(f"tokenizer {seed}")
    texts = [" ".join(chat.draw(rng, chat.LARGE)) for _ in range(6000)]
    texts += [countdown.draw(rng, _worked_share)[1] for _ in range(1000)]
    texts += ["user\n", "assistant\n", "system\n"] * 300
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=BASE_SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        model_max_length=512,
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.add_tokens([AddedToken(phrase, special=False, normalized=False) for phrase in PHRASES])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _worked_share(problem: Problem) -> float:
    """About a third: enough of both kinds of answer for their words to become tokens."""
    return 1 / (1 + exp(0.9 - (problem.target - 12) / 20))
