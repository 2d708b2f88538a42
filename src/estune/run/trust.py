"""Whose code may run: a journal that someone else wrote can name any Python file, and naming it is no reason to run it.

A file is the user's own where he names it himself, in the command or in Python. What he has run so is remembered, by
place and content, in a folder of his own that no run's folder can reach: resuming on the same machine does not ask
again. Everything else that a journal leads to needs a word of his.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from estune.config import Config
from estune.errors import ACCEPT, EstuneError
from estune.journal.identity import hash_of
from estune.rewards.judge import JudgeConfig
from estune.run.code import code_file, judges, references

TRUST = "--trust-task (in Python trust_task=True)"
TRUST_MODEL = "--trust_remote_code true (in Python trust_remote_code=True)"


def refuse_foreign(
    where: str,
    config: Config,
    given: Mapping[str, Any],
    *,
    has_task: bool = False,
    trust: bool = False,
    accept: bool = False,
) -> None:
    """Refuse to run what a journal names and the user has neither named nor run himself.

    Args:
        where: the run, for the message.
        config: the run's settings.
        given: what the user gave of them.
        has_task: he gave the task itself, in Python.
        trust: the user says that this run's code may run.
        accept: the user says that changes are his: enough for a file that he has run before, in another state.

    Raises:
        EstuneError: naming the file, module or cluster.
    """
    if config.trust_remote_code and given.get("trust_remote_code") is None:
        raise EstuneError(
            f"{where}: its journal says that code of the model {config.model} may run, which only you can say; read "
            f"it, and let it run by {TRUST_MODEL}"
        )
    if trust:
        return
    named = set(texts(given))
    for reference in _code(config)[0 if not has_task else len(references(config.task)) :]:
        if reference in named:
            continue
        file = code_file(reference)
        known = set() if file is None else _known(str(file))
        if file is not None and known and (accept or hash_of(file.read_bytes()) in known):
            continue
        if known:
            raise EstuneError(f"{where}: {reference} has changed since you last ran it; go on by {ACCEPT}")
        raise EstuneError(
            f"{where}: its journal names code to be run, {reference}{f' ({file})' if file else ''}, which you have not "
            f"run from there before; read it, and let it run by {TRUST}"
        )
    for judge in _judges(config)[0 if not has_task else len(judges(config.task)) :]:
        if judge.base_url not in named and not _known(_place(judge)):
            raise EstuneError(
                f"{where}: its journal names a judge, {judge.model} at {judge.base_url or 'OPENAI_BASE_URL'}, which "
                f"would be sent completions, the key in {judge.api_key_env} and the rubric {judge.rubric[:60]!r}; go "
                f"on by {TRUST}"
            )
    for url in () if given.get("workers_at") else config.workers_at:
        if not _known(f"server {url}"):
            raise EstuneError(
                f"{where}: its journal names a server, {url}, which would be sent prompts, and the key in "
                f"VLLM_API_KEY; go on by {TRUST}, or give --workers_at, null for none"
            )
    address = config.ray_address
    if config.workers and address and address not in named and not _known(f"ray {address}"):
        raise EstuneError(
            f"{where}: its journal names a Ray cluster, {address}, whose machines would run code here; go on by "
            f"{TRUST}, or give --ray_address or --workers null"
        )


def remember(config: Config) -> None:
    """Note that the user lets run what these settings name. Where nothing can be noted, he will be asked again."""
    with suppress(OSError):
        for reference in _code(config):
            file = code_file(reference)
            if file is not None:
                _note(str(file), hash_of(file.read_bytes()))
        for judge in _judges(config):
            _note(_place(judge), "")
        for url in config.workers_at:
            _note(f"server {url}", "")
        if config.workers and config.ray_address:
            _note(f"ray {config.ray_address}", "")


def _code(config: Config) -> list[str]:
    return [reference for options in (config.task, *config.watch) for reference in references(options)]


def _judges(config: Config) -> list[JudgeConfig]:
    return [judge for options in (config.task, *config.watch) for judge in judges(options)]


def _place(judge: JudgeConfig) -> str:
    """What a judge is remembered by: where what is the user's goes."""
    return f"judge {judge.base_url} {judge.api_key_env} {judge.rubric}"


def texts(value: Any) -> Iterable[str]:
    """All that stands in settings as they were given, lists with commas taken apart."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts(item)]
    return [part.strip() for part in str(value).strip("[]").split(",")]


def _known(place: str) -> set[str]:
    try:
        return set(_file(place).read_text().split("\n"))
    except OSError:
        return set()


def _note(place: str, content: str) -> None:
    if content not in _known(place):
        file = _file(place)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file.open("a") as notes:
            notes.write(f"{content}\n")


def _file(place: str) -> Path:
    root = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(root) / "estune" / "trusted" / hash_of(place.encode())
