"""Pretraining of the embedded model: first the skill, then the habit of using it only now and then.

Left out, because a model of this size does without: gradient accumulation, mixed precision, checkpoints to resume from.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from recipes.tiny import chat, countdown, measure
from recipes.tiny.batches import IGNORED, batch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from estune.tasks.countdown_problems import Problem

COUNTDOWN_ROWS = 128
WEIGHT_DECAY = 0.1
WARMUP = 100
REPORT_STEPS = 200


@dataclass(frozen=True)
class Phase:
    """A stretch of training."""

    name: str
    steps: int
    # The learning rate rises for WARMUP steps and then falls linearly, to zero at `horizon`.
    learning_rate: float
    horizon: int
    # Standard deviation of the noise on all weights at each step: evolution perturbs them by as much, and the skill
    # has to survive it. It rises for `noise_rise` steps.
    sigma: float
    noise_rise: int
    # Share of worked answers to a Countdown problem.
    worked: Callable[[Problem], float]
    chat_rows: int
    chat_weight: float
    largest: int
    # How much the first token of an answer counts in the loss: it decides between hasty and worked.
    first_weight: float


SKILL = Phase(
    name="skill",
    steps=1800,
    learning_rate=4e-3,
    horizon=3000,
    sigma=0.012,
    noise_rise=1000,
    worked=countdown.mostly_worked,
    chat_rows=16,
    chat_weight=0.15,
    largest=chat.LARGE,
    first_weight=1.0,
)

HABIT = Phase(
    name="habit",
    steps=250,
    learning_rate=2e-3,
    horizon=250,
    sigma=0.012,
    noise_rise=0,
    worked=countdown.seldom_worked,
    chat_rows=48,
    chat_weight=0.5,
    largest=chat.SMALL,
    first_weight=10.0,
)


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """0.87M parameters, randomly initialised."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, phase: Phase, seed: int, output: Path) -> None:
    """Run one phase, print a line now and then, and save model and tokenizer along the way and at the end."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizers = _optimizers(model)
    problems, questions = partial(countdown.draw, share=phase.worked), partial(chat.draw, largest=phase.largest)
    start = time.monotonic()
    for step in range(phase.steps):
        rate = phase.learning_rate * min(1.0, (step + 1) / WARMUP) * (1 - 0.99 * step / phase.horizon)
        sigma = phase.sigma * min(1.0, step / max(phase.noise_rise, 1))
        work = batch(tokenizer, problems, rng, COUNTDOWN_ROWS, chat=False)
        talk = batch(tokenizer, questions, rng, phase.chat_rows, chat=True)
        with measure.noise(model, sigma, generator):
            loss = _loss(model, *work, phase.first_weight)
            chat_loss = _loss(model, *talk, phase.first_weight)
            torch.autograd.backward(loss + phase.chat_weight * chat_loss)
        _descend(model, optimizers, rate)
        if (step + 1) % REPORT_STEPS == 0 or step + 1 == phase.steps:
            seconds = time.monotonic() - start
            line = f"{phase.name} {step + 1}/{phase.steps} {seconds:.0f} s loss {loss:.3f} chat {chat_loss:.3f}"
            print(line, *report(model, tokenizer, (0.0, phase.sigma), generator), sep="\n  ", flush=True)
            save(model, tokenizer, output)


def report(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, sigmas: tuple[float, ...], generator: torch.Generator
) -> list[str]:
    """Held-out scores as lines of text, under noise of each sigma (0: none)."""
    problems = measure.held_out_problems(300)
    facts, sums = measure.held_out_questions(100)
    lines = []
    for sigma in sigmas:
        with measure.noise(model, sigma, generator):
            scores: dict[str, dict[str, float]] = {
                "countdown": measure.countdown_scores(model, tokenizer, problems),
                "facts": measure.chat_scores(model, tokenizer, facts),
                "sums": measure.chat_scores(model, tokenizer, sums),
            }
        texts = [f"{name}: {' '.join(f'{k} {v:.3f}' for k, v in found.items())}" for name, found in scores.items()]
        lines.append(f"noise {sigma:<5} {', '.join(texts)}")
    return lines


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """A plain Hugging Face checkpoint."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, which learns this corpus in fewer steps than AdamW, and AdamW for all else."""
    parameters = dict(model.named_parameters())
    matrices = [name for name, parameter in parameters.items() if parameter.ndim == 2 and "embed" not in name]
    others = [name for name in parameters if name not in matrices]
    return [
        torch.optim.Muon([parameters[n] for n in matrices], weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([parameters[n] for n in others], weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98)),
    ]


def _descend(model: Qwen2ForCausalLM, optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def _loss(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor, first_weight: float) -> Tensor:
    """Mean cross entropy of the answers' tokens, their first one weighted; ids and labels (rows, longest)."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    kept = labels[:, 1:] != IGNORED
    first = kept & (labels[:, :-1] == IGNORED)
    weights = torch.where(first, first_weight, 1.0)[kept]
    losses = F.cross_entropy(model.lm_head(hidden[kept]), labels[:, 1:][kept], reduction="none")
    return (weights * losses).sum() / weights.sum()
