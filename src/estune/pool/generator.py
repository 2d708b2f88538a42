"""An engine with its model's own weights, as they are: what evaluation needs, and all that it needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.utils.logging import disable_progress_bar

from estune.completion import Completion, Engine, Sampling
from estune.config import Config
from estune.engines.progress import OWN, Progress
from estune.engines.transformers import TransformersEngine
from estune.pool.turns import gpus_of, in_turn
from estune.weights.checkpoint import Checkpoint, locate
from estune.weights.device import chosen_device


class Generator:
    """Generates in this process.

    Args:
        engine: with the weights to generate with.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        return self.engine.generate(prompt_ids, sampling)

    def progress(self) -> Progress:
        """What the engine has done so far."""
        return OWN.now()

    def close(self) -> None:
        """End what the engine has started. A model in this process goes with the last reference."""
        self.engine.close()


def open_generator(config: Config) -> Generator:
    """A generator with the model that the settings name. Any device and any types will do.

    Raises:
        EstuneError: for a model or a device that cannot be had.
    """
    set_up_process(config)
    checkpoint = Checkpoint(locate(config.model))
    if config.engine == "vllm":
        from estune.engines.vllm.engine import VllmEngine

        with in_turn(gpus_of(config)):
            return Generator(VllmEngine(checkpoint, config))
    return Generator(open_transformers(checkpoint, config, chosen_device(config.device)))


def set_up_process(config: Config) -> None:
    """Let PyTorch use the threads that the settings give an engine, and transformers show no bars among ours."""
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
    )


def sharers(config: Config, device: torch.device) -> int:
    """Engines on a device. On a CPU, whose memory is seldom what is short, it does not matter."""
    return 1 if device.type == "cpu" else max(config.replicas or 1, config.sharing)
