"""A conversation with a model: what it has been told so far, and its answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from estune.completion import Completion, Message, Prompt
from estune.config import Config
from estune.engines.tokenizer import open_encoder
from estune.errors import EstuneError
from estune.journal.base import base_checkpoint
from estune.journal.journal import Journal, is_run
from estune.pool.generator import open_transformers, set_up_process
from estune.pool.open import available_cores
from estune.run.directory import checkpoint_to_serve
from estune.run.evaluate import settings_for
from estune.run.make import make_sampling
from estune.run.trust import refuse_foreign
from estune.weights.adapted import open_checkpoint
from estune.weights.device import chosen_device


class Chat:
    """A conversation with a model. One without a chat template goes on with each text by itself, and keeps none.

    Args:
        config: the settings; their model is the one to talk to.
        system: what the conversation begins with.

    Raises:
        EstuneError: for a model that cannot be had, or that has no chat template for `system`.
    """

    def __init__(self, config: Config, system: str | None = None) -> None:
        set_up_process(config)
        self.encoder = open_encoder(config)
        if system is not None and not self.encoder.has_template:
            raise EstuneError(
                f"--system: the tokenizer of {config.model} has no chat template to tell it by; leave it out"
            )
        self.engine = open_transformers(
            open_checkpoint(config.model, config.adapter), config, chosen_device(config.device)
        )
        self._sampling = make_sampling(config, config.seed)
        self._first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._messages = list(self._first)

    def answer(self, said: str, told: Callable[[str], None]) -> Completion:
        """The model's answer.

        Args:
            said: what it is told.
            told: called with the answer so far as it grows. What it raises, or Ctrl-C, ends the answer, which is
                kept as far as it has come.

        Raises:
            EstuneError: for a conversation that is longer than the model reaches.
        """
        question: Message = {"role": "user", "content": said}
        prompt: Prompt = [*self._messages, question] if self.encoder.has_template else said
        (ids,) = self.encoder.encode([prompt])
        reach = self.encoder.positions
        if reach is not None and len(ids) >= reach:
            raise EstuneError(
                f"the conversation has {len(ids)} tokens, and the model reaches {reach}: begin anew with /clear, or "
                "say it in fewer words"
            )
        longest = self._sampling.max_new_tokens if reach is None else reach - len(ids)
        sampling = replace(self._sampling, max_new_tokens=min(self._sampling.max_new_tokens, longest))
        # The next answer is drawn by other random numbers.
        self._sampling = replace(self._sampling, seed=self._sampling.seed + 1)
        heard = ""

        def hear(text: str) -> None:
            nonlocal heard
            heard = text
            told(text)

        try:
            return self.engine.stream(ids, sampling, hear)
        finally:
            if heard:
                self._messages += [question, {"role": "assistant", "content": heard}]


def open_chats(
    model: str, given: Mapping[str, Any], system: str | None = None, *, compare: bool = False
) -> dict[str, Chat]:
    """Conversations with a run's best checkpoint or another model and, on request, with the model it was trained from.

    Args:
        model: a run's directory, whose settings are then used, or a model.
        given: settings, on top of the run's.
        system: what each conversation begins with.
        compare: with the base model too; for a run.

    Returns:
        Each by what it is called.

    Raises:
        EstuneError: for a model that cannot be had, or a base where there is no run.
    """
    trained = is_run(model)
    if compare and not trained:
        raise EstuneError(
            f"--compare shows a run's base model beside it, and {model} is no run's directory: leave it out"
        )
    config = settings_to_talk(model, given)
    adapter = None if trained else config.adapter  # a run's checkpoint holds it
    with TemporaryDirectory(prefix="estune-chat-") as folder:  # for as long as weights are loaded
        models = {"tuned" if trained else model: checkpoint_to_serve(model, Path(folder))}
        if compare:
            journal = Journal.read(Path(model))
            models["base"] = base_checkpoint(journal.header, journal.base_model()).path
        each = {name: {"model": str(place), "adapter": adapter} for name, place in models.items()}
        return {name: Chat(config.model_copy(update=changes), system) for name, changes in each.items()}


def settings_to_talk(model: str, given: Mapping[str, Any]) -> Config:
    """The settings to answer with, in this process.

    Args:
        model: a run's directory, whose settings are then used, or a model.
        given: settings, on top of the run's.

    Raises:
        EstuneError: for a journal or settings that cannot be used.
    """
    config = settings_for(model, given)
    if is_run(model):
        refuse_foreign(model, config, given, has_task=True, trust=True)  # no code runs but, if he says so, a model's
    threads = config.threads if "threads" in given else available_cores()  # a run's are those of one replica of several
    return config.model_copy(update={"engine": "transformers", "threads": threads})
