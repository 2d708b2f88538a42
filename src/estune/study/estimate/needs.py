"""What a step does, and the memory that it needs for weights, base and decoding. Nothing but arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from estune.engines.memory import GPU_CONTEXT, LOGITS_BYTES
from estune.engines.memory import fitting_rows as rows_that_fit
from estune.study.estimate.machines import GB, Device
from estune.study.estimate.shapes import Shape
from estune.weights.grid import Grid
from estune.weights.moments import BYTES as MOMENTS
from estune.weights.policies import BYTES, PATCHED, POLICIES, PolicyName

PREFILL_HIDDEN = 4  # activations alive at once in a layer, of the residual's size
PREFILL_WIDTH = 3  # and of the widest size
WIDENED = 2  # matrices of integers that are widened at once, as those of one input are one
SLOT_RANK = 8  # of vLLM's LoRA layers, for noise of rank 2 to 8
CPU_PROCESS = 4 * GB // 10  # Python, torch and compiled kernels, each replica anew

Place = Literal["device", "host"]
Way = Literal["one by one", "fused", "forward", "slots", "low-rank slots"]
"""How an engine decodes members: those of low rank together, by the kernels for the CPU or by the model's own forward
(`engines/together.py`); and in vLLM's slots those of an adapter, or those of low rank."""


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
    policy: PolicyName = "master"
    base: Place = "device"
    workers: int | None = None  # engines in all, each with a base of its own; None for replicas on one device
    parallel: int = 1  # GPUs that every matrix of an engine is split over
    engine: Literal["transformers", "vllm"] = "transformers"
    captured: bool = False  # whether decoding steps are replayed from CUDA graphs
    share: float = 1.0  # part of a device's memory that its engines may take
    steps: int = 1  # of the run
    evaluations: int = 0  # of the run
    evaluated: int = 0  # prompts of an evaluation
    looks: int = 0  # times that the base completes a member's prompts after an update
    moments: bool = False  # of updates, beside the base
    group_size: int = 64  # of integer weights
    carry_steps: int = 50
    keeps_error: bool = False  # what updates of integer weights carry on
    drawn: int = 1  # members whose noise is drawn to perturb by one
    again: int = 0  # members of earlier steps whose noise an update draws again
    rank: int = 0  # outer products that noise of a matrix is the sum of; 0 where it is of no low rank
    way: Way = "one by one"
    together: int = 1  # members that an engine decodes in one batch, at most

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its longest completion."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def over_base(self) -> bool:
        """Whether members are added to what the base computes, and no weights are perturbed."""
        return self.way in {"fused", "forward", "low-rank slots"}

    @property
    def by_row(self) -> bool:
        """Whether a CPU adds what a row's member does element by element, and not by products of matrices."""
        return self.over_base and (self.way != "low-rank slots" or self.rank == 1)

    def members_of_job(self, engines: int) -> int:
        """Members that an engine is given at a time, with so many engines.

        No more than each one's part, but where those who are together are the same with any number of engines.
        """
        return self.together if self.way == "forward" else min(self.together, math.ceil(self.population / engines))

    def held_by(self, policy: PolicyName, base: Place) -> Work:
        """The same with weights held in another way, over which members of low rank may have to be decoded alone."""
        how = POLICIES[policy]
        alone = self.over_base and (how.drifts or bool(how.bits))
        found = replace(self, policy=policy, base=base, moments=self.moments and policy == self.policy)
        return replace(found, way="one by one", together=1) if alone else found

    @property
    def grid(self) -> Grid | None:
        """That of integer weights."""
        return POLICIES[self.policy].grid(self.group_size, self.carry_steps)

    @property
    def redrawn(self) -> int:
        """Members of earlier steps whose noise an update draws again, in the mean."""
        if self.grid is None or self.keeps_error:
            return self.again
        return self.population * (min(self.carry_steps, self.steps) - 1) // 2

    @property
    def replicas(self) -> int:
        """Sets of weights on one device; a policy that drifts allows one."""
        return 1 if POLICIES[self.policy].drifts else self.at_once

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


def trained(shape: Shape, work: Work) -> int:
    """Elements that are trained: of integer weights matrices alone."""
    return shape.trained if work.grid is None else shape.integers


def slot_elements(shape: Shape, rank: int) -> tuple[int, int]:
    """Elements of a slot of vLLM's for a member of low rank: in the LoRA layers, which know no ranks from 2 to 7, and
    of what is trained beside them (`engines/vllm/additions.py`).
    """
    return (1 if rank == 1 else SLOT_RANK) * shape.layered, rank * (shape.sides - shape.layered) + shape.flat


def base_bytes(shape: Shape, work: Work) -> int:
    """Bytes of an engine's base, or of what is kept in its place."""
    policy = POLICIES[work.policy]
    found = policy.base_bytes(shape.trained, work.dtype)
    if policy.twin is not None and work.over_base:  # no member is taken back, and there are no patches
        found -= int(shape.trained * BYTES[work.dtype] * PATCHED)
    return found


def trained_bytes(shape: Shape, work: Work) -> int:
    """Bytes of these, as they generate."""
    elements = trained(shape, work)
    return elements * BYTES[work.dtype] if work.grid is None else work.grid.bytes(elements)


def total(items: Iterable[Item]) -> float:
    """The sum of the lines."""
    return sum(item.amount for item in items)


def fitting_rows(shape: Shape, work: Work, memory: int, *, share: int, most: int) -> int:
    """Rows that the engine decodes at once, as `TransformersEngine` counts them: without slots of captured graphs.

    Args:
        shape, work: what is decoded.
        memory: bytes of the device.
        share: a batch may take one part in `share` of what live weights leave of it.
        most: rows at most.
    """
    bytes_ = BYTES[work.dtype]
    room = (memory - shape.parameters * bytes_ // work.parallel) // share
    cache = shape.cached * work.longest * bytes_ // work.parallel
    return rows_that_fit(room, cache=cache, vocabulary=shape.vocabulary, most=most)


def memory(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> list[Item]:
    """Memory of one engine on its device, or on each of several GPUs.

    Over several GPUs, weights, base, keys and values, and the widest activations are split. The residual is not, and
    neither are logits, which are gathered where a token is chosen. For keys and values vLLM takes what is left of its
    part of a GPU, for one sequence at least, and lets the others wait.

    Args:
        shape, work, device: what runs where.
        prefill_tokens: tokens in one forward of prompts.
    """
    bytes_ = BYTES[work.dtype]
    rows = work.rows
    parallel = work.parallel
    split = f" / {parallel} GPUs" if parallel > 1 else ""
    policy = POLICIES[work.policy]
    base = base_bytes(shape, work)
    tokens = min(prefill_tokens, rows * work.prompt_tokens)
    dtype = policy.dtype(work.dtype)
    held = f"{shape.trained:,} x {BYTES[dtype]} B ({dtype})"
    if not policy.keeps_base:
        held = f"no base; patches for up to {PATCHED:.1%} of {held}" if base else "nothing is kept"
    if policy.splits_base:
        held = f"the lower halves of {shape.trained:,} float32 weights"
        held += "" if work.over_base else f", and patches for up to {PATCHED:.1%} of them"
    if base and work.base == "host":
        held = f"{held} in pinned host memory"
        base = 0
    if base and shares_base(work, device):
        held = f"{held}, one for all replicas"
    live = shape.parameters * bytes_
    live_how = f"{shape.parameters:,} parameters x {bytes_} B ({work.dtype}){split}"
    if work.grid is not None:
        live, live_how = _integers_live(shape, work, work.grid)
    if shape.stored is not None:
        live = shape.stored + shape.trained * BYTES["float32"]
        live_how = f"{shape.stored:,} B as they are quantised, and the adapter's {shape.trained:,} x 4 B (float32)"
    row = work.slots * shape.cached * bytes_ / parallel
    cached = f"{rows} rows x {work.slots:,} tokens x {shape.cached * bytes_:,} B{split}"
    weights = [
        Item("live weights", live / parallel, live_how),
        Item(f"base (weights={work.policy})", base / parallel, held + (split if base else "")),
        *(
            [
                Item(
                    "moments (adam)",
                    0 if work.base == "host" else shape.trained * MOMENTS / parallel,
                    f"{shape.trained:,} x {MOMENTS} B{split}, where the base is",
                )
            ]
            if work.moments
            else []
        ),
        *_beside_integers(shape, work),
        of_members(shape, work),
    ]
    rest = [
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
        process_memory(device),
    ]
    cache = rows * row
    if work.engine == "vllm" and device.is_gpu:
        left = work.share * device.memory / work.replicas - total([*weights, *rest])
        if left < cache:
            cache = max(left, row)
            cached = f"what is left for {cached}"
    return [*weights, Item("key and value cache", cache, cached), *rest]


def of_members(shape: Shape, work: Work) -> Item:
    """Memory of the members that are decoded together."""
    count = work.together
    if work.way == "slots":
        bytes_ = BYTES[work.dtype]
        how = f"{count} slots of {shape.trained:,} x {bytes_} B, and the adapter that is perturbed, x 4 B (float32)"
        return Item("members' adapters", count * shape.trained * bytes_ / work.parallel + 4 * shape.trained, how)
    if work.way == "low-rank slots":
        bytes_ = BYTES[work.dtype]
        layers, beside = slot_elements(shape, work.rank)
        vectors = shape.vectors(work.rank)
        how = f"{count} slots of {layers:,} x {bytes_} B in LoRA layers, {count + 1} of {beside:,} x {bytes_} B beside "
        how += f"them, and a member's {vectors:,} x 4 B"
        slots = (count * layers + (count + 1) * beside) * bytes_
        return Item("members in slots", slots / work.parallel + 4 * vectors, how)
    if work.over_base:
        bytes_ = 4 if work.way == "fused" else BYTES[work.dtype]
        vectors = shape.vectors(work.rank)
        how = f"vectors of {count} members, which are decoded together, x {vectors:,} x {bytes_} B"
        return Item("noise", count * vectors * bytes_, how)
    return Item("noise", 0, "made in registers as it is added, never stored")


def _integers_live(shape: Shape, work: Work, grid: Grid) -> tuple[int, str]:
    """Bytes of live weights, of which some are integers, and how they come about."""
    bytes_ = BYTES[work.dtype]
    others = shape.parameters - shape.integers
    how = f"{shape.integers:,} integers of {grid.bits} bits, with scales, and {others:,} others x {bytes_} B"
    return trained_bytes(shape, work) + others * bytes_, how


def _beside_integers(shape: Shape, work: Work) -> list[Item]:
    """Memory of what integer weights take beside themselves, if there are any."""
    if work.grid is None:
        return []
    bytes_ = BYTES[work.dtype]
    widest = WIDENED * max((math.prod(each) for each in shape.matrix_shapes.values()), default=0)
    found = [Item("a matrix, widened", widest * bytes_, f"{widest:,} x {bytes_} B ({work.dtype}), for its product")]
    if work.keeps_error:
        found.append(Item("carried on (carry=keep)", shape.integers * 4, f"{shape.integers:,} x 4 B (float32)"))
    return found


def memory_of_all(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> float:
    """Bytes of all engines on one device. Replicas on a CPU share one base; other engines have one each.

    The arguments are those of `memory`.
    """
    replicas = work.replicas
    shared = base_bytes(shape, work) if shares_base(work, device) else 0
    return replicas * total(memory(shape, work, device, prefill_tokens)) - (replicas - 1) * shared


def shares_base(work: Work, device: Device) -> bool:
    """Whether engines on a device share one base, as replicas on a CPU do. Workers know nothing of each other."""
    keeps_base = POLICIES[work.policy].keeps_base
    return keeps_base and not device.is_gpu and work.workers is None and work.at_once > 1 and not work.moments


def process_memory(device: Device) -> Item:
    """Bytes that a process takes on its device, whatever it does."""
    if device.is_gpu:
        return Item("the process", GPU_CONTEXT, "CUDA's context, kernels and graphs")
    return Item("the process", CPU_PROCESS, "Python, torch and kernels, beside all that")
