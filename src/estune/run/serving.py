"""A finished run, or any model, behind an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from estune.agents.endpoint import Endpoint
from estune.engines.continuous import Batcher
from estune.engines.tokenizer import open_encoder
from estune.errors import EstuneError
from estune.journal.journal import is_run
from estune.pool.generator import open_transformers, set_up_process
from estune.run.chat import settings_to_talk
from estune.run.directory import checkpoint_to_serve
from estune.run.make import make_sampling
from estune.weights.adapted import open_checkpoint
from estune.weights.device import chosen_device


@contextmanager
def serving(
    model: str,
    given: Mapping[str, Any],
    step: int | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    key: str | None = None,
) -> Iterator[tuple[Endpoint, str]]:
    """Serve a run's best checkpoint or another model as long as the context lasts.

    Args:
        model: a run's directory, whose settings are then the defaults of requests, or a model.
        given: settings, on top of the run's.
        step: the weights after so many of the run's steps, rebuilt from its base model and journal.
        host, port: as `Endpoint` takes them.
        key: what clients authorize themselves with; a random one by default.

    Yields:
        The endpoint, and the key.

    Raises:
        EstuneError: for a model, a step or a port that cannot be had.
    """
    if step is not None and not is_run(model):
        raise EstuneError(f"--step {step} is one of a run's, and {model} is no run's directory: leave it out")
    config = settings_to_talk(model, given)
    set_up_process(config)
    name = Path(model).resolve().name if Path(model).exists() else model
    with TemporaryDirectory(prefix="estune-serve-") as folder:
        place = checkpoint_to_serve(model, Path(folder), step)
        config = config.model_copy(update={"model": str(place), "adapter": None if is_run(model) else config.adapter})
        encoder = open_encoder(config)
        with Endpoint(encoder, make_sampling(config, config.seed), model=name, host=host, port=port) as endpoint:
            engine = open_transformers(
                open_checkpoint(config.model, config.adapter), config, chosen_device(config.device)
            )
            with Batcher(engine) as batcher:
                endpoint.serve(batcher)
                yield endpoint, endpoint.admit(config.seed, lambda turn: None, key)
                endpoint.serve(None)
