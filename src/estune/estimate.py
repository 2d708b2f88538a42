"""What a run needs, from the model's sizes alone: memory, and about how long a step takes. Arithmetic, nothing else.

Memory of Evolution Strategies is weights, base, and what decoding takes. Memory of reinforcement learning is set beside
it, for the same model, prompts and completions: mixed-precision AdamW keeps 16 bytes a parameter (ZeRO, arXiv
1910.02054, section 3.1), and activations are those of full recomputation (Korthikanti et al., arXiv 2205.05198,
sections 4.1 and 5).

Time is a roofline: each part takes as long as its slowest resource, at the rates in `estune.devices`. It leaves out
grading, evaluation and the journal, and is an estimate, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from estune.devices import GB, PCIE, Device
from estune.shapes import Shape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

LOGITS_BYTES = 3 * 4  # a logit in float32, and what softmax or argmax keeps beside it (engines/transformers.py)
PREFILL_HIDDEN, PREFILL_WIDTH = 4, 3  # activations alive at once in a layer, of the residual's and of the widest size
GPU_CONTEXT = GB  # CUDA's context, compiled kernels, workspaces
CPU_PROCESS = 4 * GB // 10  # Python, torch and compiled kernels, each replica anew

# Bytes a parameter of mixed-precision training with AdamW, 16 in all (arXiv 1910.02054, section 3.1).
RL_WEIGHTS, RL_GRADIENTS, RL_MASTER, RL_MOMENTS = 2, 2, 4, 8
RL_CHECKPOINT, RL_LAYER = 2, 34  # bytes a token and hidden unit: of each layer's input, and of the layer recomputed
RL_LOGITS = 2 * 4  # bytes a token and vocabulary entry: logits in float32 and their gradient
RL_MICRO_BATCH = 1  # sequences in one backward pass

Policy = Literal["master", "copy", "inplace"]
Place = Literal["device", "host"]


@dataclass(frozen=True, slots=True)
class Item:
    """One line of an estimate."""

    name: str
    amount: float  # bytes, or seconds
    how: str


@dataclass(frozen=True, slots=True)
class Work:
    """What a step does, and how its replicas hold their weights."""

    population: int
    prompts: int
    prompt_tokens: int  # of a prompt, on average
    new_tokens: float  # of a completion, on average
    max_new_tokens: int
    rows: int  # sequences decoded at once
    slots: int  # tokens that a sequence's cache has room for
    at_once: int  # members evaluated at once on one device, or on GPUs that share an engine
    dtype: str  # of the live weights
    policy: Policy = "master"
    base: Place = "device"
    workers: int | None = None  # engines in all, each with a base of its own; None for replicas on one device
    parallel: int = 1  # GPUs that every matrix of an engine is split over

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its longest completion."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def engines(self) -> int:
        """Members evaluated at once, on all devices together."""
        return self.workers or self.at_once

    @property
    def places(self) -> int:
        """Devices, or groups of GPUs that share an engine."""
        return math.ceil(self.engines / self.at_once)

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.places * self.parallel


def total(items: Iterable[Item]) -> float:
    """Sum of the lines."""
    return sum(item.amount for item in items)


def base_bytes(shape: Shape, policy: Policy, dtype: str) -> int:
    """Bytes of the base that a policy keeps beside the live weights."""
    return shape.trained * {"master": BYTES["float32"], "copy": BYTES[dtype], "inplace": 0}[policy]


def fitting_rows(shape: Shape, work: Work, memory: int, *, share: int, most: int) -> int:
    """Rows that the engine decodes at once: one part in `share` of the memory beyond the live weights, at most `most`.

    As `TransformersEngine` counts them, which does not count the slots that captured graphs add.
    """
    bytes_ = BYTES[work.dtype]
    row = shape.cached * work.longest * bytes_ // work.parallel + LOGITS_BYTES * shape.vocabulary
    return max(1, min(most, (memory - shape.parameters * bytes_ // work.parallel) // share // row))


def memory(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> list[Item]:
    """Memory of one engine on its device, or on each of several GPUs.

    Weights, base, keys and values and the widest activations are split; the residual and, as they are gathered for the
    choice of a token, logits are not.

    Args:
        shape, work, device: what runs where.
        prefill_tokens: tokens in one forward of prompts.
    """
    bytes_, rows, parallel = BYTES[work.dtype], work.rows, work.parallel
    split = f" / {parallel} GPUs" if parallel > 1 else ""
    base = base_bytes(shape, work.policy, work.dtype)
    tokens = min(prefill_tokens, rows * work.prompt_tokens)
    held = {
        "master": f"{shape.trained:,} x 4 B (float32)",
        "copy": f"{shape.trained:,} x {bytes_} B ({work.dtype})",
        "inplace": "nothing is kept",
    }[work.policy]
    if base and work.base == "host":
        held, base = f"{held} in pinned host memory", 0
    if base and _shares_base(work, device):
        held = f"{held}, one for all replicas"
    live = f"{shape.parameters:,} parameters x {bytes_} B ({work.dtype}){split}"
    return [
        Item("live weights", shape.parameters * bytes_ / parallel, live),
        Item(f"base (weights={work.policy})", base / parallel, held + (split if base else "")),
        Item("noise", 0, "made in registers as it is added, never stored"),
        Item(
            "key and value cache",
            rows * work.slots * shape.cached * bytes_ / parallel,
            f"{rows} rows x {work.slots:,} tokens x {shape.cached * bytes_:,} B{split}",
        ),
        Item(
            "logits",
            rows * shape.vocabulary * LOGITS_BYTES,
            f"{rows} rows x {shape.vocabulary:,} entries x {LOGITS_BYTES} B",
        ),
        Item(
            "activations",
            tokens * (PREFILL_HIDDEN * shape.hidden + PREFILL_WIDTH * shape.width / parallel) * bytes_,
            f"{tokens:,} tokens of prompts x ({PREFILL_HIDDEN} x {shape.hidden:,} + {PREFILL_WIDTH} x {shape.width:,}"
            f"{split}) x {bytes_} B",
        ),
        _process(device),
    ]


def memory_of_all(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> float:
    """Bytes on one device of all engines there. Replicas on a CPU share one base, others have one each.

    Arguments as for `memory`.
    """
    replicas = _replicas(work)
    shared = base_bytes(shape, work.policy, work.dtype) if _shares_base(work, device) else 0
    return replicas * total(memory(shape, work, device, prefill_tokens)) - (replicas - 1) * shared


def _replicas(work: Work) -> int:
    """Replicas on the device: inplace holds one set of weights."""
    return 1 if work.policy == "inplace" else work.at_once


def _shares_base(work: Work, device: Device) -> bool:
    """Whether engines on a device have one base: replicas on a CPU. Workers know nothing of each other."""
    return not device.is_gpu and work.workers is None and work.at_once > 1


def _process(device: Device) -> Item:
    if device.is_gpu:
        return Item("the process", GPU_CONTEXT, "CUDA's context, kernels and graphs")
    return Item("the process", CPU_PROCESS, "Python, torch and kernels, beside all that")


def step_time(shape: Shape, work: Work, device: Device) -> list[Item]:
    """Seconds of a step's parts, one after another.

    Engines on a CPU have cores of their own. Those on one GPU share its rates, which leaves no member faster. GPUs that
    share an engine add up their rates, less what they tell each other, which is left out.
    """
    at_once = work.places if device.is_gpu else work.at_once
    device, pcie = _joined(device, work.parallel), PCIE * work.parallel
    rounds = math.ceil(work.population / at_once)
    bytes_ = BYTES[work.dtype]
    # What a pass reads of the base comes over PCIe if the base is in host memory; the live weights are written.
    base = base_bytes(shape, work.policy, work.dtype) or shape.trained * bytes_
    reading = pcie if work.base == "host" else device.bandwidth
    drawing = shape.trained / device.noise
    perturb = rounds * max(base / reading + shape.trained * bytes_ / device.bandwidth, drawing)
    replicas = _replicas(work)
    shared = _shares_base(work, device)
    update = max(2 * base / reading, work.population * drawing)
    update *= 1 / replicas if shared else replicas if device.is_gpu else 1

    batches = math.ceil(work.prompts / work.rows)
    rows = work.prompts / batches
    prefill, _ = _forward(shape, device, rows, work.prompt_tokens, work.prompt_tokens / 2, bytes_, device.prefill)
    # Rows leave the batch as they end; it lasts until the longest does. The prompts' forward gives the first token.
    tokens = work.max_new_tokens - 1
    alive = rows * (work.new_tokens - 1) / max(1, tokens)
    context = work.prompt_tokens + work.new_tokens / 2
    token, limit = _forward(shape, device, alive, 1, context, bytes_, device.decode)
    members = f"{rounds} rounds of {at_once} members" if at_once > 1 else f"{rounds} members"
    each = f"{members} x {batches} batch{'es' if batches > 1 else ''}"
    return [
        Item("perturb", perturb, f"{members}: read the base, draw {shape.trained:,} numbers, write live weights"),
        Item(
            "read the prompts",
            rounds * batches * prefill,
            f"{each} of {rows:.0f} x {work.prompt_tokens} tokens",
        ),
        Item(
            "generate",
            rounds * batches * tokens * token,
            f"{each} x {tokens:,} tokens x {1e3 * token:.3g} ms, {alive:.0f} rows on average, limited by {limit}",
        ),
        Item(
            "update",
            update,
            f"draw {work.population} x {shape.trained:,} numbers, read and write the base once"
            + (f"{', a share' if shared else ''} on each of {replicas} replicas" if replicas > 1 else ""),
        ),
    ]


def _joined(device: Device, count: int) -> Device:
    """So many devices as one."""
    return replace(
        device,
        bandwidth=device.bandwidth * count,
        prefill=device.prefill * count,
        decode=device.decode * count,
        noise=device.noise * count,
    )


def _forward(
    shape: Shape, device: Device, rows: float, tokens: int, context: float, bytes_: int, rate: float
) -> tuple[float, str]:
    """Seconds of a forward of `rows` sequences of `tokens` new tokens that look back on `context`, and what limits it.

    A product of m x k by k x n is 2 m k n operations. Attention multiplies each query with all keys, and the weights
    that come out with all values.
    """
    used = min(shape.matrices, shape.active * rows * tokens)
    flops = 2 * rows * (shape.active * tokens + shape.output)
    flops += 2 * rows * tokens * context * shape.cached * shape.grouped
    read = bytes_ * (used + shape.output + rows * context * shape.cached)
    limits = {"memory bandwidth": read / device.bandwidth, "arithmetic": flops / rate}
    name = max(limits, key=lambda limit: limits[limit])
    return limits[name] + device.per_layer * shape.layers, name


def reinforcement_learning(shape: Shape, work: Work, device: Device, method: Literal["GRPO", "PPO"]) -> list[Item]:
    """Memory that RL of all parameters needs for the same model, prompts and completions, on all its GPUs together.

    Trainer and rollout engine share the GPUs. The rollout engine is counted with the key and value cache that ES has
    here, though such engines reserve more. Rewards come from a verifier, which takes no GPU memory.
    """
    n, tokens = shape.parameters, RL_MICRO_BATCH * work.longest
    items = [
        Item("policy's weights", n * RL_WEIGHTS, f"{n:,} x {RL_WEIGHTS} B (bfloat16)"),
        Item("policy's gradients", n * RL_GRADIENTS, f"{RL_GRADIENTS} B each; 4 where they are summed in float32"),
        Item("policy's master weights", n * RL_MASTER, f"{RL_MASTER} B each (float32)"),
        Item("policy's Adam moments", n * RL_MOMENTS, f"{RL_MOMENTS} B each: two of float32"),
        Item("reference model", n * RL_WEIGHTS, f"{RL_WEIGHTS} B each, for the KL term"),
        Item("rollout engine's weights", n * RL_WEIGHTS, f"{RL_WEIGHTS} B each, a copy as vLLM keeps it"),
        Item(
            "rollout engine's cache",
            work.rows * work.slots * shape.cached * RL_WEIGHTS,
            f"{work.rows} rows x {work.slots:,} tokens, as ES has",
        ),
        Item(
            "activations",
            tokens * shape.hidden * (RL_CHECKPOINT * shape.layers + RL_LAYER),
            f"{tokens:,} tokens x {shape.hidden:,} x ({RL_CHECKPOINT} x {shape.layers} layers + {RL_LAYER}) B: layers' "
            "inputs kept, the rest recomputed",
        ),
        Item(
            "logits",
            tokens * shape.vocabulary * RL_LOGITS,
            f"{tokens:,} tokens x {shape.vocabulary:,} x {RL_LOGITS} B: float32 and gradient",
        ),
    ]
    if method == "PPO":
        each = RL_WEIGHTS + RL_GRADIENTS + RL_MASTER + RL_MOMENTS
        items.insert(5, Item("critic", n * each, f"{each} B each: trained as the policy, and of its size"))
    return [*items, _process(device)]


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to hold the weights, or a method, and whether its memory is there."""

    name: str
    needed: float  # bytes, on all devices together
    host: float  # bytes of pinned host memory
    devices: int | None  # of this kind that hold it; None where no number does
    fits: bool  # whether the run's devices are enough


def choices(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> list[Choice]:
    """The run as it is set, the other ways to hold its weights, and RL for comparison.

    What ES has on a device must fit there: nothing is split but by `parallel`. RL's memory is taken to be split evenly
    over as many devices as it takes, as ZeRO's third stage and FSDP do.
    """
    ways: list[tuple[Policy, Place]] = [("master", "device"), ("copy", "device")]
    if work.workers is None:
        ways += [("inplace", "device")]
    if device.is_gpu:
        ways += [("master", "host"), ("copy", "host")]
    as_set = (work.policy, work.base)
    found = []
    for policy, base in [as_set, *(way for way in ways if way != as_set)]:
        one = replace(work, policy=policy, base=base)
        needed = memory_of_all(shape, one, device, prefill_tokens)
        kept = work.places * _replicas(one) * base_bytes(shape, policy, work.dtype) if base == "host" else 0
        fits = needed <= device.memory
        found.append(
            Choice(_name(policy, base, device), work.devices * needed, kept, work.devices if fits else None, fits)
        )
    for method in ("GRPO", "PPO"):
        needed = total(reinforcement_learning(shape, work, device, method))
        process = _process(device).amount
        devices = math.ceil((needed - process) / (device.memory - process))
        found.append(Choice(method, needed, 0, devices, devices <= work.devices))
    return found


def _name(policy: Policy, base: Place, device: Device) -> str:
    """A way to hold the weights, as settings."""
    return f"weights={policy}" + (f" base_device={base}" if device.is_gpu and policy != "inplace" else "")


def fitting_batch(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> int:
    """The largest `batch_size` below the run's with which its replicas fit; 0 where none does."""
    for rows in range(work.rows - 1, 0, -1):
        if memory_of_all(shape, replace(work, rows=rows), device, prefill_tokens) <= device.memory:
            return rows
    return 0


def fitting_split(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> int:
    """The least GPUs an engine on which the run fits as it is set, a quarter of each left for batches; 0 if none do."""
    if not device.is_gpu or work.at_once > 1:
        return 0
    for parallel in (2, 4, 8):
        split = replace(work, parallel=parallel)
        needed = memory_of_all(shape, split, device, prefill_tokens)
        if parallel > work.parallel and needed <= 3 * device.memory / 4:
            return parallel
    return 0


def advice(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> str:
    """One sentence: whether the run fits as it is set and, if not, what would."""
    as_set, *others = [c for c in choices(shape, work, device, prefill_tokens) if c.name not in {"GRPO", "PPO"}]
    used = f"{as_set.needed / work.devices / GB:.3g} of {device.memory / GB:.3g} GB"
    if work.devices > 1:
        used += f" on each of {work.devices} GPUs"
    if as_set.fits:
        return f"{as_set.name} fits: it takes {used}"
    would = [other.name for other in others if other.fits]
    if batch := fitting_batch(shape, work, device, prefill_tokens):
        would.append(f"batch_size={batch}")
    if not would and (split := fitting_split(shape, work, device, prefill_tokens)):
        would.append(f"engine=vllm gpus_per_worker={split}")
    if not would:
        return f"{as_set.name} does not fit: it needs {used}, and no other way to hold the weights fits either"
    return f"{as_set.name} does not fit: it needs {used}; what does: {', or '.join(would)}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """All of it, for one run."""

    model: str
    shape: Shape
    work: Work
    device: Device
    memory: list[Item]  # of one engine, on each of its devices
    time: list[Item]  # of one step
    reinforcement_learning: dict[str, list[Item]]  # by method
    choices: list[Choice]
    advice: str


def make_estimate(model: str, shape: Shape, work: Work, device: Device, prefill_tokens: int) -> Estimate:
    """All of it, for one run; `prefill_tokens` as for `memory`."""
    return Estimate(
        model=model,
        shape=shape,
        work=work,
        device=device,
        memory=memory(shape, work, device, prefill_tokens),
        time=step_time(shape, work, device),
        reinforcement_learning={
            "GRPO": reinforcement_learning(shape, work, device, "GRPO"),
            "PPO": reinforcement_learning(shape, work, device, "PPO"),
        },
        choices=choices(shape, work, device, prefill_tokens),
        advice=advice(shape, work, device, prefill_tokens),
    )
