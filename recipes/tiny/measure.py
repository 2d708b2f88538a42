"""What the model can do: greedily, when made to work a problem out, and under weight noise."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from recipes.tiny import chat, countdown
from recipes.tiny.batches import in_chat
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from estune.rewards.countdown import answer_reward
from estune.tasks.conciseness_facts import all_facts, is_held_out
from estune.tasks.countdown_problems import Problem, countdown_prompt, generate_problems

WORKED_OPENING = "\n"


def held_out_problems(size: int) -> list[Problem]:
    return generate_problems(
        size, "evaluation", 0, count=countdown.COUNT, numbers=countdown.NUMBERS, target=countdown.TARGET
    )


def held_out_questions(size: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Questions kept out of the corpus with their answers: all facts there are, and `size` sums."""
    facts = [(question, answer) for question, answer in all_facts() if is_held_out(question)]
    rng = random.Random("held-out sums")
    sums: dict[str, str] = {}
    while len(sums) < size:
        question, _, result = chat.draw_sum(rng, chat.SMALL)
        if is_held_out(question):
            sums[question] = result
    return facts, list(sums.items())


@contextmanager
def noise(model: nn.Module, sigma: float, generator: torch.Generator) -> Iterator[None]:
    """Add Gaussian noise to every weight, and take it out again exactly."""
    clean = [parameter.data.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=sigma)
    try:
        yield
    finally:
        for parameter, value in zip(model.parameters(), clean, strict=True):
            parameter.data.copy_(value)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], longest: int
) -> list[list[int]]:
    """Greedy continuations as token ids, without the end token. Prompts of equal length go together: no padding."""
    ids = tokenizer(list(prompts))["input_ids"]
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(ids):
        groups[len(row)].append(i)
    found: list[list[int]] = [[] for _ in prompts]
    for group in groups.values():
        rows = _greedy(model, torch.tensor([ids[i] for i in group]), tokenizer.eos_token_id, longest).tolist()
        for i, row in zip(group, rows, strict=True):
            found[i] = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
    return found


@torch.inference_mode()
def _greedy(model: PreTrainedModel, ids: Tensor, stop: int, longest: int) -> Tensor:
    """(rows, prompt) to (rows, at most `longest`); `stop` after the end."""
    cache = None
    output: list[Tensor] = []
    ended = torch.zeros(len(ids), dtype=torch.bool)
    while len(output) < longest and not bool(ended.all()):
        result = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        token = result.logits[:, -1].argmax(-1).masked_fill(ended, stop)
        output.append(token)
        ended |= token == stop
        ids = token[:, None]
    return torch.stack(output, dim=1)


def countdown_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> dict[str, float]:
    """Greedy accuracy, share of problems worked out, and accuracy where every answer has to begin as a worked one."""
    prompts = [countdown_prompt(problem.numbers, problem.target) for problem in problems]
    numbers, targets = [problem.numbers for problem in problems], [problem.target for problem in problems]

    def texts(opening: str) -> list[str]:
        found = answers(model, tokenizer, [prompt + opening for prompt in prompts], longest=32)
        return [opening + text for text in tokenizer.batch_decode(found)]

    def accuracy(completions: list[str]) -> float:
        rewards = answer_reward(prompts=prompts, completions=completions, numbers=numbers, target=targets)
        return sum(reward or 0.0 for reward in rewards) / len(rewards)

    free = texts("")
    return {
        "accuracy": accuracy(free),
        "worked": sum(text.startswith(WORKED_OPENING) for text in free) / len(free),
        "skill": accuracy(texts(WORKED_OPENING)),
    }


def chat_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Share of answers that hold the gold answer as a word, and their mean length in tokens."""
    found = answers(model, tokenizer, [in_chat(tokenizer, question) for question, _ in questions], longest=64)
    texts = [
        text.lower().rstrip(".").replace(".", " ").replace(",", " ").split() for text in tokenizer.batch_decode(found)
    ]
    right = [gold.lower() in words for words, (_, gold) in zip(texts, questions, strict=True)]
    return {"right": sum(right) / len(right), "length": sum(map(len, found)) / len(found)}
