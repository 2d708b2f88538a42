"""The machine that a run is on, as its figures are judged by it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from estune.engines.memory import total_memory
from estune.pool.open import available_cores


def machine(device: str) -> dict[str, Any]:
    """This machine: `processor`, `cores` that this process may use, `memory` in bytes, and `device`.

    Args:
        device: what the weights are on, as `Description.device` calls it: a GPU's name. On a CPU it is the processor's
            architecture.
    """
    return {
        "processor": processor(),
        "cores": available_cores(),
        "memory": total_memory(torch.device("cpu")),
        "device": device,
    }


def processor(information: Path = Path("/proc/cpuinfo")) -> str:
    """What this machine's processor is called.

    Args:
        information: Linux's description of the processors; on other systems Python is asked.
    """
    lines = information.read_text().splitlines() if information.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
