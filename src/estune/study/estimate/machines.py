"""Speed and memory of the machines for which a run may be planned."""

from __future__ import annotations

import difflib
import itertools
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from estune.errors import EstuneError
from estune.study.estimate.shapes import Shape

GB = 10**9
TERA = 10**12

# Shares of a data sheet's peak that this arithmetic counts on.
BANDWIDTH_SHARE = 0.75  # of memory bandwidth: streaming kernels reach 0.8 to 0.9, strided keys and values less
COMPUTE_SHARE = 0.5  # of FLOP/s, with everything between products: well-tuned training reports 0.4 to 0.6
OUTER_OPERATIONS = 3  # per element of an outer product: the product, its coefficient, the sum
NOISE_OPERATIONS = 100  # per element: ten rounds of Philox for four, a logarithm, a root and sine or cosine for two
PCIE = 25 * GB  # bytes a second to pinned host memory: version 4, 16 lanes, 32 GB/s in theory
# A GPU stands still between two kernels even where a CUDA graph starts them: 1.3 us on an H100 ("Look Ma, No Bubbles!",
# hazyresearch.stanford.edu, 2025-05-27).
KERNEL_GAP = 1.3e-6
# And the host takes so long to ask for one, operation by operation: 8.4 ms for a token of Llama 3.1 8B on an H100
# (spheron.network, 2026; 5.1 ms from a CUDA graph), which is 1,398 operations here. The driver alone takes 4 to 6 us.
KERNEL_ISSUE = 6e-6

CPU_OUTER = 2.5e9  # products of two vectors' elements a second and core, half as many where rows have their own
CPU_PER_LAYER = 0.15e-3  # seconds of Python and dispatch in a decoder layer, on one core
MEASURED_ROWS = 256  # at most, and matrices of at most 2048 x 2048: larger products are no faster


@dataclass(frozen=True, slots=True)
class GPU:
    """One line of a vendor's data sheet: FLOP/s without sparsity, sums in float32; GB are 10^9 bytes.

    Memory is a lower bound: drivers as a rule report more, such as 85 GB for a sheet's 80.
    """

    key: str
    name: str
    gigabytes: int
    bandwidth: float  # TB/s
    bfloat16: float  # TFLOP/s
    float32: float  # TFLOP/s, without TensorFloat-32
    source: str
    float16: float | None = None  # where it is not bfloat16's


GPUS = (
    GPU("b200", "NVIDIA B200", 180, 8.0, 2250, 75, "DGX and HGX B200 data sheets, an eighth"),
    GPU("h200", "NVIDIA H200 SXM", 141, 4.8, 989, 67, "H200 data sheet"),
    GPU("h100", "NVIDIA H100 SXM", 80, 3.35, 989, 67, "H100 data sheet"),
    GPU("h100-pcie", "NVIDIA H100 PCIe", 80, 2.0, 756, 51, "H100 PCIe data sheet"),
    GPU("a100-80", "NVIDIA A100 SXM 80 GB", 80, 2.039, 312, 19.5, "A100 data sheet"),
    GPU("a100-40", "NVIDIA A100 40 GB", 40, 1.555, 312, 19.5, "A100 data sheet"),
    GPU("l40s", "NVIDIA L40S", 48, 0.864, 362, 91.6, "L40S data sheet"),
    GPU("a6000", "NVIDIA RTX A6000", 48, 0.768, 154.8, 38.7, "RTX A6000 data sheet"),
    GPU("rtx5090", "NVIDIA GeForce RTX 5090", 32, 1.792, 209.5, 104.8, "RTX Blackwell white paper"),
    GPU("rtx4090", "NVIDIA GeForce RTX 4090", 24, 1.008, 165.2, 82.6, "Ada white paper"),
    GPU("rtx3090", "NVIDIA GeForce RTX 3090", 24, 0.936, 71, 35.6, "GA102 white paper"),
    GPU("a10", "NVIDIA A10", 24, 0.6, 125, 31.2, "A10 data sheet"),
    GPU("l4", "NVIDIA L4", 24, 0.3, 121, 30.3, "L4 data sheet"),
    # Turing computes no bfloat16: its products run at float32's rate.
    GPU("t4", "NVIDIA T4", 16, 0.32, 8.1, 8.1, "T4 data sheet", float16=65),
)


@dataclass(frozen=True, slots=True)
class Device:
    """What the arithmetic counts on: sustained rates, not peaks."""

    name: str
    memory: int  # bytes
    bandwidth: float  # bytes a second
    prefill: float  # FLOP/s, of many tokens at once
    decode: float  # FLOP/s, of one token a row
    noise: float  # elements a second
    per_layer: float  # seconds of Python a layer, in which nothing is computed
    is_gpu: bool
    how: str  # where the figures come from
    gap: float = 0  # seconds between two kernels, in which nothing is computed
    issue: float = 0  # seconds of the host for each kernel, beside what is computed
    outer: float = math.inf  # elements of outer products a second


def find_gpu(name: str) -> GPU:
    """The line of the table with this key, in any spelling such as `RTX-4090` or `a100_80`.

    Raises:
        EstuneError: the table has no such line.
    """
    keys = {_plain(gpu.key): gpu for gpu in GPUS}
    if _plain(name) in keys:
        return keys[_plain(name)]
    near = _called(name) or [keys[key] for key in difflib.get_close_matches(_plain(name), keys, 1)]
    hint = f"did you mean {' or '.join(gpu.key for gpu in near)}? known are" if near else "known are"
    raise EstuneError(f"--gpu: {name!r} is not in the table; {hint} {', '.join(gpu.key for gpu in GPUS)}")


def recognise(name: str, memory: int) -> GPU:
    """The line of the table for a driver's name of a GPU, such as `NVIDIA A100-SXM4-80GB`.

    Raises:
        EstuneError: the table has no such line.
    """
    found = _called(name)
    if not found:
        raise EstuneError(
            f"this machine's GPU, {name}, is not in the table: give the one most like it with --gpu, of "
            f"{', '.join(gpu.key for gpu in GPUS)}"
        )
    is_pcie = "pcie" in name.lower()
    return min(found, key=lambda g: (("pcie" in g.key) != is_pcie, abs(g.gigabytes * GB - memory)))


def this_gpu(device: str) -> tuple[GPU, int] | None:
    """The line of the table and the bytes of the GPU that `device` stands for on this machine; None for the CPU."""
    import torch

    from estune.weights.device import training_device

    chosen = training_device(device)
    if chosen.type == "cpu":
        return None
    if chosen.type != "cuda":
        raise EstuneError(f"device {chosen.type}: no GPU of its kind is in the table; give one like it with --gpu")
    properties = torch.cuda.get_device_properties(chosen)
    return recognise(properties.name, properties.total_memory), properties.total_memory


def _called(name: str) -> list[GPU]:
    """The lines of the GPU named in a driver's name, in all its forms and sizes of memory."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    # Whole words, as L40 is no L4; and neighbours as one, as in RTX 4090.
    known = {*words, *map("".join, itertools.pairwise(words))}
    return [gpu for gpu in GPUS if gpu.key.partition("-")[0] in known]


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def as_device(gpu: GPU, dtype: str, memory: int | None = None) -> Device:
    """The rates to count on with weights of type `dtype`, and `memory` bytes, by default those of the data sheet."""
    memory = memory or gpu.gigabytes * GB
    half = gpu.float16 if dtype == "float16" and gpu.float16 else gpu.bfloat16
    peak = (gpu.float32 if dtype == "float32" else half) * TERA
    return Device(
        name=f"{gpu.name}, {memory / GB:.3g} GB",
        memory=memory,
        bandwidth=gpu.bandwidth * TERA * BANDWIDTH_SHARE,
        prefill=peak * COMPUTE_SHARE,
        decode=peak * COMPUTE_SHARE,
        noise=gpu.float32 * TERA / 2 / NOISE_OPERATIONS,  # data sheets count a multiply-add as two
        outer=gpu.float32 * TERA / 2 / OUTER_OPERATIONS,
        per_layer=0,
        is_gpu=True,
        gap=KERNEL_GAP,
        issue=KERNEL_ISSUE,
        how=(
            f"{gpu.source}: {gpu.bandwidth:g} TB/s, {peak / TERA:g} TFLOP/s in {dtype}; counted on are "
            f"{BANDWIDTH_SHARE:.0%} of the bandwidth and {COMPUTE_SHARE:.0%} of the FLOP/s, {1e6 * KERNEL_GAP:g} us "
            f"between kernels, and {1e6 * KERNEL_ISSUE:g} us to ask for one outside of a CUDA graph"
        ),
    )


def measure_cpu(shape: Shape, rows: int, dtype: str, threads: int) -> Device:
    """This machine's rates, measured by two matrix products, a copy and a perturbation, in half a second.

    Args:
        shape: the model, whose layers' sizes are multiplied.
        rows: sequences decoded at once.
        dtype: type of the weights.
        threads: CPU threads to compute with.
    """
    import torch

    from estune.engines.memory import total_memory
    from estune.noise import cpu

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decode = _product_rate(shape, max(1, min(rows, MEASURED_ROWS)), dtype)
        prefill = _product_rate(shape, 4 * MEASURED_ROWS, dtype)
        source, target = torch.zeros(2, 16 << 20)
        bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source), 0.05)
        live, base = target[: 4 << 20].numpy(), source[: 4 << 20].numpy()
        noise = base.size / _fastest(lambda: cpu.perturb(live, base, 0, 0, 0, 1.0), 0.05)
    finally:
        torch.set_num_threads(before)
    return Device(
        name=f"this machine's CPU, {threads} thread{'s' if threads > 1 else ''} a replica",
        memory=total_memory(torch.device("cpu")),
        bandwidth=bandwidth,
        prefill=prefill,
        decode=decode,
        noise=noise * threads,
        outer=CPU_OUTER * threads,
        per_layer=CPU_PER_LAYER,
        is_gpu=False,
        how=(
            f"measured: {bandwidth / GB:.0f} GB/s, {decode / GB:.0f} GFLOP/s in {dtype} products of {rows} rows and "
            f"{prefill / GB:.0f} of {4 * MEASURED_ROWS}, {noise / 1e6:.0f} million perturbed weights a second and "
            f"thread; assumed: {CPU_PER_LAYER * 1e3:g} ms of Python a layer"
        ),
    )


def _product_rate(shape: Shape, rows: int, dtype: str) -> float:
    """FLOP/s of a product of `rows` activations with a matrix of the model's shape."""
    import torch

    from estune.pool.fastest import product_of

    kind = getattr(torch, dtype)
    own = shape.own and dtype != "float16"
    inner = min(2048, shape.hidden)
    outer = min(2048, shape.width)
    left = torch.ones(rows, inner, dtype=torch.float32 if own else kind)
    right = torch.ones(outer, inner, dtype=kind)
    product = product_of(own=own)
    return 2 * rows * inner * outer / _fastest(lambda: product(left, right), 0.1)


def _fastest(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, after one to warm up."""
    work()
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
