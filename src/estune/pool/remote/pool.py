"""The pool whose workers are vLLM servers, reached over HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from estune.agents.play import Limits
from estune.config import Config
from estune.engines.loading import generation_config
from estune.engines.tokenizer import end_tokens, open_encoder
from estune.journal.identity import model_files
from estune.pool.crewed import CrewPool
from estune.pool.deadlines import Deadlines
from estune.pool.remote.handle import Named, Reader, RemoteHandle, key_of_environment, named
from estune.pool.remote.turns import Stage
from estune.pool.remote.wire import Terms
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import locate


def open_remote_pool(config: Config) -> RemotePool:
    """The servers at `config.workers_at`, of which at least one is ready.

    Raises:
        EstuneError: none answers, or none can train what the run wants.
    """
    return RemotePool(config).opened()


class RemotePool(CrewPool):
    """Servers as workers. Their weights stay theirs: checkpoints are written here, by replay over this base."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, len(config.workers_at), Servers(config))

    def _sent(self, prompt_ids: Sequence[Sequence[int]]) -> Named:
        return named(prompt_ids)


class Servers:
    """As `Source`: the servers that the settings name.

    Args:
        config: the settings.
    """

    def __init__(self, config: Config) -> None:
        self._urls = config.workers_at
        self._key = key_of_environment()
        self._terms = terms_of(config)
        checkpoint = Checkpoint(locate(config.model))
        path = checkpoint.path
        self._encoder = open_encoder(config)
        model = SimpleNamespace(config=self._encoder.config)
        model.generation_config = generation_config(path, model.config)
        self._ends = end_tokens(model, self._encoder.tokenizer)
        self._reader = Reader(self._encoder.tokenizer, self._ends)
        self._limits = Limits.of(config)
        self._base: dict[str, Any] = {"base_hash": checkpoint.content_hash(), "files": model_files(path)}
        self._handles: dict[int, RemoteHandle] = {}

    def hire(self, number: int, deadlines: Deadlines) -> RemoteHandle:
        """As `Source.hire`."""
        stage = Stage(self._encoder, self._ends, self._limits)
        url = self._urls[number]
        handle = RemoteHandle(number, url, self._key, self._terms, self._base, self._reader, deadlines, stage)
        self._handles[number] = handle
        return handle

    def check(self, *, at_once: bool = False) -> None:
        """As `Source.check`: there is nothing that all of them need."""

    def missing(self, seconds: float, lost: str) -> str:
        """As `Source.missing`."""
        absent = "; ".join(f"{handle.url}: {handle.absent or lost}" for handle in self._handles.values())
        return (
            f"for {seconds:.0f} s no server has answered ({absent}): start them or mend workers_at, and start or "
            "resume; who starts slowly is waited for as long as worker_timeout says"
        )


def new_lease() -> str:
    """A name for a run, which nobody guesses."""
    return secrets.token_hex(16)


def terms_of(config: Config) -> Terms:
    """What a run wants of its servers."""
    return Terms(
        new_lease(),
        config.weights,
        config.rounding,
        config.noise_mode,
        config.train_parameters,
        config.base_device,
        config.vllm_max_model_length,
        None if config.dtype == "auto" else config.dtype,
        config.sigma_scale,
    )
