"""Rotary embeddings that turn by other angles in long texts than in short ones (LongRoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def short_reach(config: Any) -> int | None:
    """The length in tokens up to which a text is short; None for a model that turns texts of all lengths alike.

    LongRoPE (arXiv 2402.13753) has one set of angles for texts up to the length that the model was first trained with,
    and another beyond. transformers takes the longest row of a forward as the measure of all its rows, so that rows of
    both kinds must not meet in one. "dynamic" angles change beyond `max_position_embeddings`, where no engine goes.

    Args:
        config: a transformers model's.
    """
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [found, *found.values()]  # one for all layers, or one for each type of layer
    reaches = [
        int(kind["original_max_position_embeddings"])
        for kind in kinds
        if isinstance(kind, Mapping) and kind.get("rope_type") == "longrope"
    ]
    return min(reaches, default=None)
