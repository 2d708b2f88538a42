"""What a run depends on beside its tensors and its data, hashed, so that a change is noticed and named.

Here are the configuration, the tokenizer and the chat template of a model; the code of tasks is in `run/code.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from estune.errors import ACCEPT, EstuneError
from estune.weights import adapters
from estune.weights.checkpoint import Checkpoint
from estune.weights.locate import companions
from estune.weights.quantized import how_quantized, without

UNDER = "the model under the adapter"
QUANTISED = "quantization_config"
# Of config.json, what a checkpoint is stored as, beside how it is quantised: it differs between a base and what is
# trained from it.
STORED_AS = ("dtype", "torch_dtype")


def model_files(folder: Path) -> dict[str, str]:
    """Hash of each file beside a model's weights that says what the model does, by name.

    config.json's is of its content, without the type that weights are stored as and how they are quantised, which is
    `QUANTISED`. Of an adapter it is the model's files that count, and adapter_config.json without the place of that
    model, whose tensors' hash is `UNDER`.
    """
    found = {}
    files = companions(folder)
    under = Checkpoint(folder).under
    if under is not None:
        found[UNDER] = under.content_hash()
        files = [folder / adapters.CONFIG, *companions(under.path)]
    for file in sorted(files, key=lambda file: file.name):
        if not file.name.startswith("LICENSE"):
            found[file.name] = hash_of(_content(file))
    how = how_quantized(folder if under is None else under.path)
    if how is not None:
        found[QUANTISED] = hash_of(_text(how))
    return found


def refuse_changes(
    where: str,
    recorded: Mapping[str, str],
    now: Mapping[str, str],
    *,
    accept: bool,
    details: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Refuse what is no longer what a run depends on.

    Args:
        where: the run, or its model, for the message.
        recorded: what the journal says; nothing in journals of format 1.
        now: what is found.
        accept: go on all the same, because the user insists.
        details: more about a change, by name.

    Returns:
        What is found, if it is to be recorded; empty if nothing changed.

    Raises:
        EstuneError: something changed, naming it.
    """
    if not recorded:
        return {}
    more = details or {}
    changed = [f"{name} {how}{more.get(name, '')}" for name, how in _differences(recorded, now)]
    if changed and not accept:
        raise EstuneError(
            f"{where}: {', '.join(changed)}; put back what was there, or go on with what is there now by {ACCEPT}"
        )
    return dict(now) if changed else {}


def changed_settings(folder: Path, copies: Iterable[Path]) -> dict[str, str]:
    """What differs between a model's config.json and its copy in the first of a run's checkpoints that there is."""
    for copy in copies:
        try:
            before, after = (_kept(path / "config.json") for path in (copy, folder))
            keys = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
        told = ", ".join(f"{key} {before.get(key)!r:.40} -> {after.get(key)!r:.40}" for key in keys[:3])
        return {"config.json": f" ({told})"} if told else {}
    return {}


def hash_of(content: bytes) -> str:
    """A hash as journals keep it: 32 hexadecimal digits."""
    return blake2b(content, digest_size=16).hexdigest()


def _differences(recorded: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name in sorted({*recorded, *now}):
        if name not in now:
            yield name, "is no longer there"
        elif name not in recorded:
            yield name, "was not there when the run began"
        elif recorded[name] != now[name]:
            yield name, "has changed since the run began"


def _content(file: Path) -> bytes:
    if file.name == adapters.CONFIG:
        return _text(adapters.placeless(file))
    return _settings(file) if file.name == "config.json" else file.read_bytes()


def _settings(file: Path) -> bytes:
    """A config.json's content, however it is laid out."""
    try:
        return _text(_kept(file))
    except (ValueError, AttributeError, RecursionError):
        return file.read_bytes()  # whoever loads the model says what is wrong


def _kept(file: Path) -> dict[str, Any]:
    """What a config.json says but for how weights are stored."""
    content = without(json.loads(file.read_text()))
    return {key: value for key, value in content.items() if key not in STORED_AS}


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
