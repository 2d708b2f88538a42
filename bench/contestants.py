"""Who takes part in comparisons: a script over transformers' `generate` alone, and estune's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import CompileConfig
from transformers.utils.logging import disable_progress_bar

from estune.completion import Sampling
from estune.config import Config
from estune.engines.transformers import TransformersEngine
from estune.es.strategy import Member, Update
from estune.pool.local import open_local_pool
from estune.pool.open import with_resources


@dataclass(frozen=True)
class Mode:
    """A way to call `generate`: which cache, on how many threads, in how many batches of prompts sorted by length."""

    cache: str = "dynamic"
    threads: int = 1
    batches: int = 1
    compiled: bool = False

    def __str__(self) -> str:
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        return f"{self.cache} cache{', compiled' * self.compiled}, threads {self.threads}, {batches}"


class PlainScript:
    """What one would write after reading the paper, in about the authors' words, over `generate`."""

    def __init__(self, model: Path, prompts: list[list[int]], new_tokens: int, dtype: str) -> None:
        disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.prompts, self.new_tokens = prompts, new_tokens
        end_ids = self.model.generation_config.eos_token_id or []
        self.end_ids: list[int] = [end_ids] if isinstance(end_ids, int) else end_ids
        self.made: list[torch.Tensor] = []  # completions since they were last counted

    @torch.inference_mode()
    def generate(self, mode: Mode) -> list[str]:
        """Texts of all completions."""
        texts: list[str] = []
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        for part in range(mode.batches):
            rows = order[len(order) * part // mode.batches : len(order) * (part + 1) // mode.batches]
            made = self._complete([self.prompts[i] for i in rows], mode)
            self.made.append(made)
            texts += self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return texts

    def _complete(self, prompts: list[list[int]], mode: Mode) -> torch.Tensor:
        pad = self.tokenizer.pad_token_id
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=pad,
            cache_implementation="static" if mode.cache == "static" else None,
            disable_compile=not mode.compiled,
        )
        if mode.compiled:
            settings.compile_config = CompileConfig()
            settings.compile_config._compile_all_devices = True  # on a CPU `generate` compiles only when made to
        made: torch.Tensor = self.model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:]
        return made

    def completions(self) -> list[list[int]]:
        """Token ids of each prompt's completion, its end token included."""
        self.count()
        self.generate(Mode())
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        (made,) = self.made
        lengths = self._lengths(made).tolist()
        found = {i: row[:length] for i, row, length in zip(order, made.tolist(), lengths, strict=True)}
        return [found[i] for i in range(len(found))]

    def count(self) -> int:
        """Tokens generated since this was last asked, up to each row's end."""
        total = sum(int(self._lengths(made).sum()) for made in self.made)
        self.made.clear()
        return total

    def _lengths(self, made: torch.Tensor) -> torch.Tensor:
        is_end = torch.isin(made, torch.tensor(self.end_ids, dtype=made.dtype)).int()
        return (is_end.cumsum(dim=1) - is_end == 0).sum(dim=1)

    def load(self, weights: Path) -> None:
        """Take somebody else's weights."""
        self.model.load_state_dict(torch.load(weights))

    def reset(self) -> None:
        """Take back the first weights: in bfloat16, adding and subtracting noise wears them down."""
        self.model.load_state_dict(self.start)

    @torch.inference_mode()
    def add_noise(self, seed: int, scale: float) -> None:
        """Add noise to all weights, in place."""
        generator = torch.Generator()
        for parameter in self.model.parameters():
            generator.manual_seed(seed)
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=scale)

    def step(self, mode: Mode, seeds: list[int], sigma: float, coefficients: list[float]) -> None:
        """One step of evolution, but for the rewards."""
        for seed in seeds:
            self.add_noise(seed, sigma)
            self.generate(mode)
            self.add_noise(seed, -sigma)
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            self.add_noise(seed, coefficient)


class Ours:
    """The same step from estune's parts, as its trainer uses them, with replicas and threads as it would choose."""

    def __init__(self, config: Config, prompts: list[list[int]], new_tokens: int) -> None:
        self.config = with_resources(config)
        self.pool = open_local_pool(self.config)
        self.replica = self.pool.own
        self.prompts, self.sampling = prompts, Sampling(new_tokens)

    def step(self, seeds: Sequence[int], sigma: float, coefficients: Sequence[float]) -> dict[str, float]:
        """One step of evolution, but for the rewards: seconds over all replicas, and tokens generated."""
        torch.set_num_threads(self.config.threads or 1)  # another one may have set its own
        members = tuple(Member(seed) for seed in seeds)
        found = [result for _, result in self.pool.evaluate(members, sigma, self.prompts, self.sampling)]
        self.pool.apply(Update(0, members, tuple(coefficients)))
        return {
            "perturb": sum(e.perturb_time for e in found),
            "generate": sum(e.generate_time for e in found),
            "tokens": sum(len(c.token_ids) for e in found for c in e.completions),
        }

    def warm_up(self) -> None:
        """Let every replica make what it makes once."""
        members = [Member(i) for i in range(len(self.pool.replicas))]
        list(self.pool.evaluate(members, 1e-3, self.prompts[:4], self.sampling))

    def completions(self) -> list[list[int]]:
        """Token ids of each prompt's completion with the live weights, its end token included."""
        torch.set_num_threads(self.config.threads or 1)
        return [c.token_ids for c in self.replica.engine.generate(self.prompts, self.sampling)]

    def save(self, path: Path) -> None:
        """Write the live weights for `PlainScript.load`."""
        engine: Any = self.replica.engine
        torch.save(engine.model.state_dict(), path)

    def close(self) -> None:
        """End its processes."""
        self.pool.close()


class Generator:
    """estune's engine alone, without weights to change."""

    def __init__(self, model: Path, prompts: list[list[int]], dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.engine = TransformersEngine(model, dtype=dtype, device="cpu")
        self.prompts = prompts

    def generate(self, new_tokens: int) -> int:
        """Tokens generated."""
        return sum(len(c.token_ids) for c in self.engine.generate(self.prompts, Sampling(new_tokens)))


def tiny_coefficients(seeds: Sequence[int]) -> list[float]:
    """So small that all repeats see the same model."""
    return [1e-9 * (-1) ** i for i in range(len(seeds))]


def parameters(model: Any) -> int:
    """Weights of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())
