"""vLLM in a server as an engine: what `VllmWeights` perturbs there, in the server's own process."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from estune.completion import Sampling
from estune.engines.continuous import Request, Rows
from estune.engines.loading import generation_config, load_config, open_vision
from estune.engines.tokenizer import end_tokens, load_tokenizer
from estune.engines.vllm.calls import Digest, VllmCalls
from estune.engines.vllm.server import Model, Server
from estune.weights.locate import locate
from estune.weights.storage import type_name

# Calls of workers that change what generates. Each is followed by `forget`, or by the end of what was asked.
CHANGES = {"draw", "open", "perturb", "restore", "show", "shake", "unshake"}

STEP_SECONDS = 0.005
"""How long a batch waits for a row to end before others are let in."""


class ServedEngine(VllmCalls):
    """An engine over the vLLM of a server, beside whoever else uses that.

    What others have under way is waited for before weights change, and what they ask meanwhile waits.

    Args:
        server: vLLM's, from within, or a model of this process, in which no rollouts can be played.

    Raises:
        EstuneError: for a model whose files cannot be read.
    """

    def __init__(self, server: Server | Model) -> None:
        config = server.config
        model = config.model_config
        name = model.model if model.revision is None else f"{model.model}@{model.revision}"
        self.path = Path(locate(name))
        loaded = load_config(self.path, trust_remote_code=model.trust_remote_code)
        tokenizer = load_tokenizer(self.path, trust_remote_code=model.trust_remote_code)
        pictures = model.multimodal_config
        shown = pictures is not None and pictures.get_limit_per_prompt("image") > 0
        vision = open_vision(self.path, loaded, trust_remote_code=model.trust_remote_code) if shown else None
        super().__init__(name, tokenizer, loaded, model.max_model_len, vision=vision)
        self.dtype = type_name(model.dtype)
        self.parallel = config.parallel_config.world_size
        self.trusted = bool(model.trust_remote_code)
        self.end_ids = end_tokens(
            SimpleNamespace(config=loaded, generation_config=generation_config(self.path, loaded)), tokenizer
        )
        self._server = server

    @property
    def device(self) -> str:
        """The type of device that weights are on: cpu or cuda."""
        return torch.device(self._server.config.device_config.device_type).type

    def settle(self) -> None:
        """Let others' requests go on that have waited for a change of weights."""
        self._server.resume()

    def abort(self) -> None:
        """Drop what is being generated."""
        self._server.abort()

    def close(self) -> None:
        """Nothing to end: the server is its owner's."""

    def _tokens(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        return self._server.generate(prompt_ids, sampling, self.end_ids)

    def open_rows(self) -> Rows:
        """An empty batch."""
        assert isinstance(self._server, Server)
        return ServedRows(self._server, self.end_ids)

    def _scores(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._server.score(rows)

    def _likely(self, prompt_ids: Sequence[Sequence[int]], tokens: int) -> Digest:
        return self._server.log_probabilities(prompt_ids, tokens)

    def _call(self, method: str, *args: Any) -> list[Any]:
        if method in CHANGES:
            self._server.pause()
        return self._server.call(method, *args)

    def _reset(self) -> bool:
        if self.vision is not None:
            self._server.reset_encoder_cache()
        done = self._server.reset_prefix_cache()
        self._server.resume()
        return done


class ServedRows:
    """As `Rows`: the server's own batch, which prompts join and leave at any token.

    A row gains all of its tokens when it ends.

    Args:
        server: whose batch it is, and whose weights stay as they are.
        end_ids: tokens that end a completion.
    """

    most_idle: float | None = None

    def __init__(self, server: Server, end_ids: Sequence[int]) -> None:
        self._server = server
        self._ends = end_ids
        self._numbers = itertools.count()
        self._active: dict[int, Future[list[int]]] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def join(self, request: Request) -> int:
        """As `Rows.join`. Where there is no room, vLLM lets prompts wait."""
        row = next(self._numbers)
        future = self._server.begin(request.prompt_ids, request.sampling, self._ends)
        self._active[row] = future
        future.add_done_callback(lambda _: self._ended.put(row))
        return row

    def step(self) -> list[tuple[int, list[int]]]:
        """As `Rows.step`; it comes back without any after a moment, so that further prompts can join."""
        found: list[tuple[int, list[int]]] = []
        with suppress(queue.Empty):
            row = self._ended.get(timeout=STEP_SECONDS)
            while True:
                if (future := self._active.pop(row, None)) is not None:
                    found.append((row, future.result()))
                row = self._ended.get_nowait()
        return found

    def leave(self, row: int) -> None:
        """As `Rows.leave`."""
        if (future := self._active.pop(row, None)) is not None:
            future.cancel()
