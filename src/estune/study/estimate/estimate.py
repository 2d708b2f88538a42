"""What fits: the ways to hold a run's weights, RL for comparison, and advice if the run does not fit as it is set.

Memory of reinforcement learning is for the same model, prompts and completions: mixed-precision AdamW keeps 16 bytes a
parameter (ZeRO, arXiv 1910.02054, section 3.1), and activations are those of full recomputation (Korthikanti et al.,
arXiv 2205.05198, sections 4.1 and 5).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from estune.study.estimate.lengths import Lengths
from estune.study.estimate.machines import GB, Device
from estune.study.estimate.needs import (
    Item,
    Place,
    Work,
    base_bytes,
    memory,
    memory_of_all,
    process_memory,
    total,
)
from estune.study.estimate.plan import Plan, Scale, Speed, Split
from estune.study.estimate.shapes import Shape
from estune.study.estimate.times import Times
from estune.weights.policies import POLICIES, PolicyName

# Bytes a parameter of mixed-precision training with AdamW, 16 in all (arXiv 1910.02054, section 3.1).
RL_WEIGHTS = 2
RL_GRADIENTS = 2
RL_MASTER = 4
RL_MOMENTS = 8
RL_CHECKPOINT = 2  # bytes a token and hidden unit of each layer's input
RL_LAYER = 34  # and of the layer that is recomputed
RL_LOGITS = 2 * 4  # bytes a token and vocabulary entry: logits in float32 and their gradient
RL_MICRO_BATCH = 1  # sequences in one backward pass


def reinforcement_learning(shape: Shape, work: Work, device: Device, method: Literal["GRPO", "PPO"]) -> list[Item]:
    """Memory that RL of all parameters needs for the same model, prompts and completions, on all its GPUs together.

    Trainer and rollout engine share the GPUs. The rollout engine is counted with the key and value cache that ES has
    here, though such engines reserve more. Rewards come from a verifier, which needs no GPU memory.
    """
    n = shape.parameters
    tokens = RL_MICRO_BATCH * work.longest
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
    return [*items, process_memory(device)]


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to hold the weights, or a method, and whether there is memory for it."""

    name: str
    needed: float  # bytes, on all devices together
    host: float  # bytes of pinned host memory
    devices: int | None  # of this kind that hold it; None where no number does
    fits: bool  # whether the run's devices are enough


def choices(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> list[Choice]:
    """The run as it is set, the other ways to hold its weights, and RL for comparison.

    What ES keeps on a device must fit there, as only `parallel` splits it. RL's memory is assumed to be split evenly
    over as many devices as needed, as ZeRO's third stage and FSDP do.
    """
    ways: list[tuple[PolicyName, Place]] = [("master", "device"), ("copy", "device"), ("exact_inplace", "device")]
    if work.dtype == "bfloat16" and not shape.adapted:
        ways.insert(1, ("split_master", "device"))
    if work.workers is None:
        ways += [("inplace", "device")]
    if not device.is_gpu and shape.integers:
        ways += [("int8", "device"), ("int4", "device")]
    if device.is_gpu:
        ways += [("master", "host"), ("copy", "host")]
    as_set = (work.policy, work.base)
    found = []
    for policy, base in [as_set, *(way for way in ways if way != as_set)]:
        one = work.held_by(policy, base)
        needed = memory_of_all(shape, one, device, prefill_tokens)
        each = base_bytes(shape, one)
        kept = work.places * one.replicas * each if base == "host" else 0
        fits = needed <= one.share * device.memory + 1  # a byte, as sums are rounded
        found.append(
            Choice(_name(policy, base, device), work.devices * needed, kept, work.devices if fits else None, fits)
        )
    for method in ("GRPO", "PPO"):
        needed = total(reinforcement_learning(shape, work, device, method))
        process = process_memory(device).amount
        devices = math.ceil((needed - process) / (device.memory - process))
        found.append(Choice(method, needed, 0, devices, devices <= work.devices))
    return found


def _name(policy: PolicyName, base: Place, device: Device) -> str:
    """The settings for a way to hold the weights."""
    return f"weights={policy}" + (f" base_device={base}" if device.is_gpu and POLICIES[policy].keeps_base else "")


def fitting_batch(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> int:
    """The largest `batch_size` below the run's with which its replicas fit; 0 if there is none."""

    def needed(rows: int) -> float:
        return memory_of_all(shape, replace(work, rows=rows), device, prefill_tokens)

    return bisect.bisect(range(1, work.rows), work.share * device.memory, key=needed)


def fitting_split(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> int:
    """The fewest GPUs of an engine on which a sequence fits and a quarter of each is left for more; 0 if none do."""
    if not device.is_gpu or work.at_once > 1:
        return 0
    for parallel in (2, 4, 8):
        needed = total(memory(shape, replace(work, parallel=parallel, rows=1), device, prefill_tokens))
        if parallel > work.parallel and shape.splits_over(parallel) and needed <= 3 * device.memory / 4:
            return parallel
    return 0


def advice(shape: Shape, work: Work, device: Device, prefill_tokens: int) -> str:
    """A sentence that says whether the run fits as it is set and, if not, what would."""
    as_set, *others = [c for c in choices(shape, work, device, prefill_tokens) if c.name not in {"GRPO", "PPO"}]
    given = f"{device.memory / GB:.3g} GB"
    if work.share < 1:
        given = f"the {work.share * device.memory / GB:.3g} GB that vLLM is given of {given}"
    used = f"{as_set.needed / work.devices / GB:.3g} of {given}"
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
    speeds: list[Speed]  # by engine, the run's own first
    splits: list[Split]  # of a step's completions, from few members to many
    scales: list[Scale]  # by number of workers; on GPUs alone
    reinforcement_learning: dict[str, list[Item]]  # by method
    choices: list[Choice]
    advice: str


def make_estimate(
    model: str,
    shape: Shape,
    work: Work,
    device: Device,
    prefill_tokens: int,
    lengths: Lengths,
    engines: Sequence[Work],
    splits: Sequence[Work],
) -> Estimate:
    """All of it, for one run.

    Args:
        model: its name.
        shape, work, device, prefill_tokens: as for `memory`.
        lengths: of completions, to draw from.
        engines: the same work as each engine does it, the run's own first.
        splits: the same completions as other members of other prompts.
    """
    plans = [Plan(Times(shape, each, device), lengths) for each in engines]
    return Estimate(
        model=model,
        shape=shape,
        work=work,
        device=device,
        memory=memory(shape, work, device, prefill_tokens),
        time=plans[0].items(),
        speeds=[plan.speed() for plan in plans],
        splits=sorted(
            (plan.split() for plan in (plans[0], *(Plan(Times(shape, each, device), lengths) for each in splits))),
            key=lambda split: split.population,
        ),
        scales=plans[0].scales() if device.is_gpu else [],
        reinforcement_learning={
            "GRPO": reinforcement_learning(shape, work, device, "GRPO"),
            "PPO": reinforcement_learning(shape, work, device, "PPO"),
        },
        choices=choices(shape, work, device, prefill_tokens),
        advice=advice(shape, work, device, prefill_tokens),
    )
