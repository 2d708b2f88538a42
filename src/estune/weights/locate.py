"""Where the files of a model are: embedded, in a directory, in a GGUF file, or at the hub, where they are had from."""

from __future__ import annotations

import json
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from estune.errors import EstuneError, first_line
from estune.weights import adapters
from estune.weights.gguf import PACKAGED, is_gguf, pinned_gguf, plain_checkpoint
from estune.weights.pickles import PICKLES, in_safetensors

EMBEDDED = {"tiny": Path(__file__).parents[1] / "models" / "tiny"}
"""Models shipped inside the package, by the name a user gives for `model`."""
KNOWN = ", ".join((*EMBEDDED, *PACKAGED))
"""The names of all models that have one of their own, for messages."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "config.json",
    adapters.CONFIG,
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template*",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.py",  # code that a model brings
    "*processor_config.json",
    "LICENSE*",
)
"""What a model needs beside its weights: downloaded with them and copied to what is written, and nothing else."""

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@\w[\w./-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def companions(folder: Path) -> list[Path]:
    """Files that a model in this directory needs beside its weights."""
    files = (file for file in folder.iterdir() if file.is_file())
    return [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in COMPANIONS)]


def hub_name(model: str) -> tuple[str, str | None]:
    """The name and the revision (a branch, a tag or a commit) of a hub id `NAME@REVISION`."""
    name, _, revision = model.partition("@")
    return name, revision or None


def pinned(model: str) -> str:
    """What a run records of a model: a hub id with its commit, a directory's absolute path, or a GGUF file with its
    hash.

    Raises:
        EstuneError: as `locate`.
    """
    if model in EMBEDDED:
        return model
    if is_gguf(model):
        return pinned_gguf(model)
    if Path(model).exists():
        return os.path.abspath(model)
    commit = locate(model).name
    return f"{hub_name(model)[0]}@{commit}" if _COMMIT.fullmatch(commit) else model


def locate(model: str | Path) -> Path:
    """Directory of a model given as an embedded name, a local directory, a GGUF file or a hub id, which is downloaded.

    For a model with weights in a GGUF file, or in PyTorch's own files alone, it is that of a copy in safetensors.

    Raises:
        EstuneError: where there is no such model, or the directory holds none.
    """
    if is_gguf(model):
        return plain_checkpoint(model)
    path = EMBEDDED.get(str(model), Path(model))
    if not path.exists():
        if not _HUB_ID.fullmatch(str(model)):
            raise EstuneError(f"model {model}: no such directory; give a directory, a hub id or one of: {KNOWN}")
        path = _download(str(model), *COMPANIONS, INDEX, "*.safetensors")
        if not any(path.glob("*.safetensors")):
            path = _download(str(model), *COMPANIONS, *PICKLES)
    if not is_checkpoint(path):
        kind = "a file" if path.is_file() else "a directory without config.json"
        raise EstuneError(f"model {model} is {kind}, not a checkpoint: give a directory made by save_pretrained")
    path = in_safetensors(path, companions(path))
    weight_files(path)
    return path


def is_checkpoint(folder: Path) -> bool:
    """Whether a directory holds a model, or an adapter."""
    return (folder / "config.json").is_file() or adapters.is_adapter(folder)


def is_here(model: str | Path) -> bool:
    """Whether its weights are on this machine, as far as its name tells: it is no hub id."""
    return is_copied(model) or Path(model).exists()


def is_copied(model: str | Path) -> bool:
    """Whether a model's directory is not of the user's making: an embedded one's, or that of a GGUF file's copy."""
    return str(model) in EMBEDDED or is_gguf(model)


def check_name(model: str | Path) -> None:
    """Check that there is a model of this name; of a hub id only config.json is downloaded.

    Raises:
        EstuneError: as `locate`.
    """
    if is_here(model) or not _HUB_ID.fullmatch(str(model)):
        locate(model)
    else:
        _download(str(model), "config.json")


def _download(model: str, *patterns: str) -> Path:
    """Download the files of a hub id that fit the patterns; return their directory."""
    from huggingface_hub import snapshot_download

    name, revision = hub_name(model)
    try:
        # Repositories can hold the same weights again: in the original format, in folders for other libraries.
        others = ["consolidated*", "*/*"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=others))
    except Exception as error:  # the hub's library raises a dozen kinds; each means that the model cannot be had
        reason = first_line(error)
        raise EstuneError(
            f"model {model}: neither a local directory nor to be had from the hub ({reason}); check the name, the "
            f"network and, for a gated model, your login, or take one of: {KNOWN}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; where a directory holds them more than once, those that transformers loads."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if not others:
        raise EstuneError(f"{folder} holds no .safetensors weights: save the model with save_pretrained first")
    raise EstuneError(
        f"{folder} holds {len(others)} .safetensors files, but neither {SINGLE} nor {INDEX} to say which are the "
        "model's: save it with save_pretrained"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise EstuneError(f"{index} is not an index of weights: it cannot be read; copy or save it again") from error
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing or not files:
        lacking = missing[0] if missing else "no file"
        raise EstuneError(f"{index} names {lacking}, which is not there: copy or download the model again")
    return files
