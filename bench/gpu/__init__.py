"""A day with a GPU: everything that only one can show. Begin with `day.py`."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch


def accelerator(device: torch.device) -> dict[str, Any]:
    """What a figure was taken on, and with which compiler of kernels."""
    if device.type != "cuda":
        return {"device": device.type}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "memory, GB": {"free": free / 1e9, "total": total / 1e9},
        "CUDA": torch.version.cuda,
        "triton": importlib.metadata.version("triton"),
    }
