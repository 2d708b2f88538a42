"""Every contact with the internals of a vLLM server, from within it; `tests/vllm/test_contact.py` names each."""

from __future__ import annotations

import asyncio
import logging
import pickle
import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from estune.completion import Pictured, Sampling
from estune.engines.vllm import internals
from estune.errors import EstuneError

log = logging.getLogger(__name__)

BACKEND = "estune"
"""The name of the backend of weight transfer."""


def register_backend(module: str, name: str) -> None:
    """Make a class a backend of weight transfer called `estune`, and give workers a way to it.

    On a CPU, linear layers of whoever asks for it use their weights as they are, as after `keep_weights_plain`.
    A vLLM that is not known to work is left alone: whoever runs it may never ask for estune.
    """
    try:
        internals.check_version()
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except (EstuneError, ImportError) as error:
        log.info("no seeds for vLLM's weight transfer: %s", error)
        return
    from vllm.v1.worker.worker_base import WorkerBase

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKEND, module, name)
    WorkerBase.estune_call = _estune_call
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def use_weights(layer: Any, remove_weight: bool) -> None:
        if backend_of(get_current_vllm_config_or_none()) == BACKEND:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = use_weights


def backend_of(config: Any) -> str | None:
    """The backend of weight transfer that vLLM was started with, by its configuration; None without."""
    transfer = getattr(config, "weight_transfer_config", None)
    return None if transfer is None else str(transfer.backend)


def _estune_call(worker: Any, payload: bytes) -> bytes:
    """A method of all workers: call one of the `Shard`'s.

    Pickled by this server's own front end, between whose processes vLLM passes plain types alone. No client's bytes
    come here: over HTTP, even in development mode, arguments are JSON, which has no bytes.
    """
    if not isinstance(payload, bytes):
        raise TypeError("estune_call is for the server's own process")
    method, args = pickle.loads(payload)
    return pickle.dumps(worker.weight_transfer_engine.shard.call(method, *args))


class Model:
    """vLLM's engine that a user has started in this process (`vllm.LLM`), with the backend.

    Args:
        llm: the engine.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    @property
    def config(self) -> Any:
        """vLLM's configuration."""
        return self._llm.llm_engine.vllm_config

    def call(self, method: str, *args: Any) -> list[Any]:
        """As the function `call`."""
        return [pickle.loads(one) for one in self._llm.collective_rpc("estune_call", args=(_packed(method, args),))]

    def reset_prefix_cache(self) -> bool:
        """As the function of that name."""
        return internals.reset_prefix_cache(self._llm)

    def reset_encoder_cache(self) -> None:
        """As the function of that name."""
        internals.reset_encoder_cache(self._llm)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
    ) -> list[list[int]]:
        """As the function `generate`."""
        return internals.generate(self._llm, prompt_ids, sampling, end_ids)

    def log_probabilities(self, prompt_ids: Sequence[Sequence[int]], tokens: int) -> list[dict[int, float]]:
        """As the function of that name."""
        return internals.log_probabilities(self._llm, prompt_ids, tokens)

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """As the function of that name."""
        return internals.score(self._llm, rows)

    def pause(self) -> None:
        """Nobody else asks: whoever has the engine is the one who calls this."""

    def resume(self) -> None:
        """Nobody waits."""

    def abort(self) -> None:
        """Nobody goes away."""


def _packed(method: str, args: tuple[Any, ...]) -> bytes:
    return pickle.dumps((method, args))


class Server:
    """As `Model`: vLLM's engine client inside an API server, called from other threads than its event loop's.

    Args:
        client: vLLM's (`AsyncLLM`).
        loop: the event loop that it lives in.
    """

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._work: Future[Any] | None = None
        self._paused = False

    @property
    def config(self) -> Any:
        """vLLM's configuration."""
        return self._client.vllm_config

    def call(self, method: str, *args: Any) -> list[Any]:
        """As the function `call`."""
        answers = self._do(self._client.collective_rpc("estune_call", args=(_packed(method, args),)))
        return [pickle.loads(one) for one in answers]

    def reset_prefix_cache(self) -> bool:
        """As the function of that name."""
        return bool(self._do(self._client.reset_prefix_cache()))

    def reset_encoder_cache(self) -> None:
        """As the function of that name."""
        self._do(self._client.reset_encoder_cache())

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, end_ids: Sequence[int]
    ) -> list[list[int]]:
        """As the function `generate`."""
        rows = range(len(prompt_ids))
        settings = [internals.parameters(sampling, end_ids, row if sampling.temperature else 0) for row in rows]
        return [list(found.outputs[0].token_ids) for found in self._complete(prompt_ids, settings)]

    def begin(self, prompt_ids: Sequence[int], sampling: Sampling, end_ids: Sequence[int]) -> Future[list[int]]:
        """Begin to complete a prompt, beside others. Its draws are those of a single prompt of `generate`."""

        async def complete() -> list[int]:
            settings = internals.parameters(sampling, end_ids, 0)
            return list((await self._completed(prompt_ids, settings)).outputs[0].token_ids)

        return asyncio.run_coroutine_threadsafe(complete(), self._loop)

    def log_probabilities(self, prompt_ids: Sequence[Sequence[int]], tokens: int) -> list[dict[int, float]]:
        """As the function of that name."""
        return internals.likely(self._complete(prompt_ids, [internals.looking(tokens)] * len(prompt_ids)))

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """As the function of that name."""
        return internals.scores(rows, self._complete(rows, [internals.scoring()] * len(rows)))

    def pause(self) -> None:
        """Let requests that others have under way come to their ends, and new ones wait until `resume`."""
        if self._client.output_processor.has_unfinished_requests():
            self._paused = True
            self._do(self._client.pause_generation(mode="wait", clear_cache=False))

    def resume(self) -> None:
        """Let requests that wait since `pause` go on."""
        if self._paused:
            self._do(self._client.resume_generation())
            self._paused = False

    def abort(self) -> None:
        """Drop what is being generated, as nobody waits for it any more."""
        if self._work is not None:
            self._work.cancel()

    def _complete(self, prompt_ids: Sequence[Sequence[int]], settings: Sequence[Any]) -> list[Any]:
        async def complete_all() -> list[Any]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._completed(*each)) for each in zip(prompt_ids, settings, strict=True)]
            return [task.result() for task in tasks]

        self._work = asyncio.run_coroutine_threadsafe(complete_all(), self._loop)
        try:
            return list(self._work.result())
        finally:
            self._work = None

    async def _completed(self, prompt_ids: Sequence[int], settings: Any) -> Any:
        prompt: Any = {"prompt_token_ids": list(prompt_ids)}
        if isinstance(prompt_ids, Pictured):
            read = await self._client.renderer.render_cmpl_async([internals.shown(prompt_ids)])
            prompt = internals.continued(prompt_ids, *read)
        async for found in self._client.generate(prompt, settings, f"estune-{secrets.token_hex(8)}"):
            last = found
        if last.outputs and last.outputs[0].finish_reason == "abort":  # its owner's doing, such as /pause
            raise EstuneError("vLLM has dropped a completion that was under way: leave the server alone meanwhile")
        return last

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
