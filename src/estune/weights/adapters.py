"""Adapters in PEFT's format, as far as files and settings tell: what is one, and over which model.

An adapter's directory is a checkpoint of its own: `adapter_config.json` names the model that it belongs to, which is
never changed, and `adapter_model.safetensors` holds its tensors by PEFT's names. How one is begun is in `adapted.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from estune.errors import EstuneError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's, before the name of each tensor."""
ALL_LINEAR = "all-linear"
PLACE = ("base_model_name_or_path", "revision")
"""Of adapter_config.json, where the model lies that the adapter belongs to. It can move, and its content is hashed."""


def _names(value: Any) -> Any:
    """A list as a command line gives it: names with commas between, in brackets or not."""
    if isinstance(value, str):
        return [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    return value


def _whole(path: Path | None) -> Path | None:
    """From the root on, as a run can be gone on with from another directory."""
    return None if path is None else Path(os.path.abspath(path))


class Adapter(BaseModel):
    """A low-rank adapter (LoRA, arXiv 2106.09685) that is trained in place of the model's own weights."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    rank: int = Field(8, ge=1, description="rank of the product that is added to a matrix (r)")
    target: Annotated[list[str], BeforeValidator(_names)] = Field(
        [ALL_LINEAR],
        min_length=1,
        description="modules that get one, by the ends of their names, with commas between (q_proj,v_proj); all-linear "
        "is every matrix of the layers",
    )
    alpha: float = Field(16, gt=0, description="the product is scaled by alpha / rank")
    seed: int = Field(0, ge=0, lt=2**63, description="seed that A is drawn by; B begins at zero")
    path: Annotated[Path | None, AfterValidator(_whole)] = Field(
        None, description="an adapter to begin with, in PEFT's format, in place of all that stands above"
    )


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter, and not a whole model."""
    whole = (folder / "model.safetensors").is_file()
    return not whole and (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def settings_of(folder: Path) -> dict[str, Any]:
    """What an adapter's adapter_config.json says.

    Raises:
        EstuneError: it cannot be read, or is of another method than LoRA.
    """
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text())
        kind = found.get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise EstuneError(f"{file} cannot be read as an adapter's settings; save it with PEFT again") from error
    if kind != "LORA":
        raise EstuneError(f"{file}: the adapter is of type {kind!r:.40}; only LORA is trained")
    return dict(found)


def placeless(file: Path) -> dict[str, Any]:
    """An adapter_config.json without the place of the model that the adapter belongs to."""
    return {key: value for key, value in settings_of(file.parent).items() if key not in PLACE}


def model_under(folder: Path) -> tuple[str, str | None]:
    """The place of the model that an adapter belongs to, a directory or a hub id, and its revision.

    Raises:
        EstuneError: its settings name none.
    """
    settings = settings_of(folder)
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise EstuneError(f"{folder / CONFIG} names no model in base_model_name_or_path; say there where it lies")
    revision = settings.get("revision")
    return name, str(revision) if revision else None
