"""Where a model runs: the device that a setting names, and whether weights can be perturbed there."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from estune.errors import EstuneError

S = TypeVar("S")
T = TypeVar("T")


def pick_device(device: str) -> torch.device:
    """The device named, or with "auto" the best there is: CUDA, then MPS, then the CPU."""
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        found = torch.device(device)
    except RuntimeError:
        raise EstuneError(f"device: {device!r} is no device; use auto, cuda, cuda:1, mps or cpu") from None
    there = {
        "cuda": torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not there.get(found.type, False):
        raise EstuneError(f"device: {device!r} is not available to this PyTorch; use auto or cpu")
    return found


def chosen_device(name: str) -> torch.device:
    """The device named by the setting; with auto CUDA where there is one, else the CPU.

    Raises:
        EstuneError: for a device that is not there.
    """
    return pick_device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def training_device(name: str) -> torch.device:
    """The device named by the setting, as `chosen_device`, to train on.

    Raises:
        EstuneError: for a device that is not there, or for CUDA without Triton.
    """
    device = chosen_device(name)
    if device.type == "cuda":
        device_kernels()
    return device


def device_kind(device: torch.device) -> str:
    """The name of a device's kind: one of another name can round differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine() if device.type == "cpu" else f"{platform.machine()} {device.type}"


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "mps":
        torch.mps.synchronize()  # which takes no device, as there is one
    else:
        torch.get_device_module(device).synchronize(device)


def on_this_stream(device: torch.device, work: Callable[[T], S]) -> Callable[[T], S]:
    """`work` for other threads, made to run on the stream of a device that this thread is on now.

    A new thread is on the device's default stream, in no order with others, such as the one that vLLM runs on.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "current_stream"):  # Apple's MPS has one for all
        return work
    stream = module.current_stream()

    def run(item: T) -> S:
        with module.stream(stream):
            return work(item)

    return run


def device_kernels() -> Any:
    """The module of kernels for CUDA.

    Raises:
        EstuneError: without Triton.
    """
    try:
        from estune.noise import gpu
    except ImportError as error:
        raise EstuneError(
            "weights on CUDA are perturbed by Triton kernels, and triton cannot be imported "
            f"({error}); install it (pip install triton), or set device=cpu"
        ) from error
    return gpu
