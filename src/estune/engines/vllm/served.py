"""vLLM in a server as an engine: what `VllmWeights` perturbs there, in the server's own process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from estune.completion import Sampling
from estune.engines.loading import end_tokens, generation_config, load_config, load_tokenizer
from estune.engines.vllm.calls import Digest, VllmCalls
from estune.engines.vllm.server import Model, Server
from estune.weights.checkpoint import locate
from estune.weights.storage import type_name

# Calls of workers that change what generates. Each is followed by `forget`, or by the end of what was asked.
CHANGES = {"draw", "open", "perturb", "restore", "show", "shake", "unshake"}


class ServedEngine(VllmCalls):
    """An engine over the vLLM of a server, beside whoever else uses that.

    What others have under way is waited for before weights change, and what they ask meanwhile waits.

    Args:
        server: vLLM's, from within, or a model of this process.

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
        super().__init__(name, tokenizer, loaded, model.max_model_len)
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

    def _scores(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._server.score(rows)

    def _likely(self, prompt_ids: Sequence[Sequence[int]], tokens: int) -> Digest:
        return self._server.log_probabilities(prompt_ids, tokens)

    def _call(self, method: str, *args: Any) -> list[Any]:
        if method in CHANGES:
            self._server.pause()
        return self._server.call(method, *args)

    def _reset(self) -> bool:
        done = self._server.reset_prefix_cache()
        self._server.resume()
        return done
