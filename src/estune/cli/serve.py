"""The command that serves a model to other programs."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from typing import Annotated

import typer

from estune.cli.options import ConfigFile, overrides_of
from estune.cli.output import opening, say


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="a run's directory or .estune file, a checkpoint, hub id, smollm2 or tiny")
    ],
    config: ConfigFile = None,
    step: Annotated[
        int | None, typer.Option(help="the weights after so many of the run's steps; its best else")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at; 0 for any that is free")] = 8000,
    key: Annotated[str | None, typer.Option(help="what clients have to send; random by default")] = None,
) -> None:
    """Serve a run's best checkpoint, or any model, as OpenAI's API does, until Ctrl-C.

    Where a request says nothing it is answered as the run generated, or as the defaults say; settings such as
    `--temperature 0.8` and `--max-new-tokens 200` change that.
    """
    from estune.config import read

    with ExitStack() as opened:
        with opening(f"serve {model}"):
            from estune.run.serving import serving

            given = read(config, overrides_of(context.args))
            endpoint, good = opened.enter_context(serving(model, given, step, host=host, port=port, key=key))
        say(f"OPENAI_BASE_URL={endpoint.url}\nOPENAI_API_KEY={good}\nmodel: {endpoint.model}\nCtrl-C ends")
        with suppress(KeyboardInterrupt):
            wait_for_ever()


def wait_for_ever() -> None:
    """Never return; Ctrl-C and SIGTERM raise."""
    threading.Event().wait()
