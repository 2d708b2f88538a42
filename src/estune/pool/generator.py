"""An engine with its model's own weights, as they are, which is all that evaluation needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from transformers.utils.logging import disable_progress_bar

from estune.completion import Completion, Engine, Sampling
from estune.config import Config
from estune.engines.progress import OWN, Progress
from estune.engines.tokenizer import open_encoder
from estune.engines.transformers import TransformersEngine
from estune.grading.rollout import Opening
from estune.pool.turns import gpus_of, in_turn
from estune.weights.adapted import open_checkpoint
from estune.weights.checkpoint import Checkpoint
from estune.weights.device import chosen_device
from estune.weights.policies import POLICIES

if TYPE_CHECKING:
    from estune.agents.play import Players
    from estune.engines.continuous import Serving


class Generator:
    """Generates in this process.

    Args:
        engine: with the weights to generate with.
        config: the settings, for rollouts.
    """

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine = engine
        self._config = config
        self._players: Players | None = None

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        return self.complete(prompt_ids, sampling)

    def complete(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """As `generate`, with the weights as they are. Prompts that open rollouts are played to their ends."""
        openings = [prompt for prompt in prompt_ids if isinstance(prompt, Opening)]
        if not openings:
            return self.engine.generate(prompt_ids, sampling)
        assert len(openings) == len(prompt_ids)
        if self._players is None:
            from estune.agents.play import Limits, Players

            engine = cast("Serving", self.engine)  # as all engines are
            self._players = Players(engine, open_encoder(self._config), Limits.of(self._config))
        return self._players.play(openings, sampling)

    def progress(self) -> Progress:
        """What the engine has done so far."""
        return OWN.now()

    def close(self) -> None:
        """End what the engine has started. A model in this process goes with the last reference."""
        if self._players is not None:
            self._players.close()
        self.engine.close()


def open_generator(config: Config) -> Generator:
    """A generator with the model that the settings name, on any device and in any type.

    Raises:
        EstuneError: for a model or a device that cannot be had.
    """
    set_up_process(config)
    checkpoint = open_checkpoint(config.model, config.adapter)
    if config.engine == "vllm":
        from estune.engines.vllm.engine import VllmEngine

        with in_turn(gpus_of(config)):
            return Generator(VllmEngine(checkpoint, config), config)
    return Generator(open_transformers(checkpoint, config, chosen_device(config.device)), config)


def set_up_process(config: Config) -> None:
    """Let PyTorch use the threads that the settings give an engine, and transformers show no progress bars."""
    disable_progress_bar()
    torch.set_num_threads(config.threads or 1)


def open_transformers(checkpoint: Checkpoint, config: Config, device: torch.device) -> TransformersEngine:
    """An engine over transformers with a checkpoint's weights, on a device.

    Raises:
        EstuneError: for a model that cannot be loaded.
    """
    return TransformersEngine(
        checkpoint.path,
        dtype=config.dtype,
        device=str(device),
        batch_size=config.batch_size,
        cuda_graphs=config.cuda_graphs,
        sharers=sharers(config, device),
        trust_remote_code=config.trust_remote_code,
        plain=bool(POLICIES[config.weights].bits),
    )


def sharers(config: Config, device: torch.device) -> int:
    """How many engines share the memory of a device; 1 on a CPU, whose memory is seldom short."""
    return 1 if device.type == "cpu" else max(config.replicas or 1, config.sharing)
