"""The plugin by which a vLLM server answers estune (`VLLM_PLUGINS=estune`). Imported inside the server alone."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from typing import Any

from estune.config import Config
from estune.engines.vllm.served import ServedEngine
from estune.engines.vllm.server import BACKEND, Server, backend_of
from estune.engines.vllm.weights import VllmWeights
from estune.errors import EstuneError
from estune.pool.open import available_cores
from estune.pool.remote.service import Service, add_routes
from estune.pool.remote.wire import PATH, Terms
from estune.pool.replica import Trained
from estune.weights.checkpoint import Checkpoint

log = logging.getLogger(__name__)


class Plugin:
    """vLLM's `EndpointPlugin`."""

    name = "estune"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add our routes to the server's."""
        add_routes(app, lambda request: request.app.state.estune)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Make what answers them."""
        refuse_unfit(engine_client.vllm_config, args)
        if not (args.api_key or _key_of_environment()):
            log.warning("%s answers whoever reaches it: give --api-key where that is not you alone", PATH)
        server = Server(engine_client, asyncio.get_running_loop())
        engine = await asyncio.to_thread(ServedEngine, server)
        state.estune = service_over(engine)


def refuse_unfit(config: Any, args: Namespace) -> None:
    """Refuse servers whose weights cannot be those of a member.

    Raises:
        EstuneError: the server was started otherwise than it must be.
    """
    for wrong, remedy in (
        (backend_of(config) != BACKEND, f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\''),
        (config.parallel_config.data_parallel_size > 1, "one server for each replica, not --data-parallel-size"),
        (getattr(args, "api_server_count", 1) not in (None, 1), "--api-server-count 1"),
    ):
        if wrong:
            raise EstuneError(f"VLLM_PLUGINS names estune, which needs {remedy}: start the server with it")


def service_over(engine: ServedEngine) -> Service:
    """What answers calls by an engine."""
    return Service(engine.name, lambda terms: open_replica(engine, terms), engine.settle, engine.abort)


def open_replica(engine: ServedEngine, terms: Terms) -> Trained:
    """A replica over the server's model, as a run wants it.

    Raises:
        EstuneError: the server holds it otherwise than the run needs it, or it cannot be trained.
    """
    if terms.length is not None and engine.positions is not None and terms.length > engine.positions:
        raise EstuneError(
            f"the run's prompts and completions take up to {terms.length} tokens, the server's --max-model-len is "
            f"{engine.positions}: raise it, or lower max_new_tokens"
        )
    if terms.dtype not in (None, engine.dtype):
        raise EstuneError(f"the run wants {terms.dtype} weights, the server has {engine.dtype}: start it with --dtype")
    config = Config(
        model=str(engine.path),
        engine="vllm",
        device=engine.device,
        dtype=engine.dtype,
        gpus_per_worker=engine.parallel,
        trust_remote_code=engine.trusted,
        threads=available_cores() if engine.device == "cpu" else 1,
        weights=terms.weights,
        rounding=terms.rounding,
        noise=terms.noise,
        sigma_scale=terms.sigma_scale,
        train_parameters=terms.train_parameters,
        base_device=terms.base_device,
    )
    # vLLM has taken its share of a GPU already, and nobody has left room for a base there.
    on_host = engine.device == "cuda" and terms.base_device != "device"
    checkpoint = Checkpoint(engine.path)
    weights = VllmWeights(engine, checkpoint, config, base_on_host=on_host)
    return Trained(engine, weights, checkpoint, config, engine.call("kind")[0])


def _key_of_environment() -> str | None:
    from vllm import envs

    key: str | None = envs.VLLM_API_KEY
    return key
