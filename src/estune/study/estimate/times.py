"""About how long the parts of a step take. This is a roofline: each part takes as long as its slowest resource, at the
rates of `machines.py`, plus the time to start kernels.

It leaves out grading and the journal, and is an estimate, not a promise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from estune.study.estimate.machines import PCIE, Device
from estune.study.estimate.needs import Way, Work, base_bytes, shares_base, slot_elements, trained, trained_bytes
from estune.study.estimate.schedule import finish
from estune.study.estimate.shapes import Shape
from estune.weights.moments import BYTES as MOMENTS
from estune.weights.policies import BYTES, POLICIES

Array = npt.NDArray[Any]

GRAPH_SLOTS = 7 / 6  # slots that attention reads in a captured graph, to those that are filled, in the mean
CHOICE_KERNELS = 20  # that choose a token and keep the books, in the transformers engine's step
# Of a layer in vLLM: two norms with the residual, query, key and value, rotation, keys and values stored, attention and
# its reduction, output, gate and up, gating, down (vllm/model_executor/models/llama.py, 0.32).
VLLM_KERNELS = 11
# What a step of vLLM takes beside its kernels. For one row of Llama 3.2 1B an H100 reads at most half of its bandwidth
# with vLLM ("Look Ma, No Bubbles!", as for `KERNEL_GAP`), so that a token takes 1.48 ms: 1.2 by this arithmetic.
VLLM_STEP = 0.3e-3
# Seconds in which GPUs that share an engine add up what each has, twice a layer: latency alone, which is about what an
# all-reduce of some 100 kB takes over NVLink.
EXCHANGE = 10e-6

# Kernels beside a model's own where members are decoded together: of each tensor two vectors are looked up, multiplied
# and added (`engines/together.py`); of vLLM's four kinds of products in a layer there are two each, and after each of
# two norms one that adds what members do, if all of it is fused.
ADDED_KERNELS: dict[Way, int] = {"one by one": 0, "fused": 0, "forward": 4, "slots": 8, "low-rank slots": 10}
CPU_PER_TENSOR = 7e-6  # seconds of Python, on one core, for a member's vectors of one tensor


class Times:
    """Seconds of the parts of one run.

    Engines on a CPU have cores of their own. Engines on one GPU share its rates, and are together no faster than one,
    but for what their processes do beside the GPU. GPUs that share an engine add up their rates.

    Args:
        shape, work, device: what runs where.
    """

    def __init__(self, shape: Shape, work: Work, device: Device) -> None:
        self.shape = shape
        self.work = work
        self._given = device
        self.device = replace(
            device,
            bandwidth=device.bandwidth * work.parallel,
            prefill=device.prefill * work.parallel,
            decode=device.decode * work.parallel,
            noise=device.noise * work.parallel,
            outer=device.outer * work.parallel,
        )
        self._bytes = BYTES[work.dtype]
        self._vectors = shape.vectors(work.rank)
        policy = POLICIES[work.policy]
        self._keeps_base = policy.keeps_base
        self._live = trained_bytes(shape, work)
        beside = 2 if policy.splits_base else 1  # the other half
        self._base = base_bytes(shape, work) if policy.keeps_base else beside * self._live
        self._passes = 1 if policy.keeps_base else 2  # where nothing is kept, the member before is taken back first
        # What a pass reads of the base comes over PCIe if the base is in host memory; the live weights are written.
        self._reading = PCIE * work.parallel if work.base == "host" else self.device.bandwidth
        self._kernels = VLLM_KERNELS * shape.layers if work.engine == "vllm" else shape.kernels + CHOICE_KERNELS
        self._kernels += ADDED_KERNELS[work.way] * (shape.layers if work.engine == "vllm" else shape.tensors)
        self._added, self._multiplied, self._chosen = self._beside_weights()

    def alone(self) -> Times:
        """Those of what the base generates, as in an evaluation."""
        return Times(self.shape, replace(self.work, way="one by one", together=1), self._given)

    def restore(self) -> float:
        """Seconds to make the weights the base again, which members that are added to it ask for once a step."""
        if not self.work.over_base or not self._keeps_base:
            return 0.0
        return self._base / self._reading + self._live / self.device.bandwidth

    def perturb(self, members: int = 1) -> float:
        """Seconds to make ready to decode so many members together: to perturb the weights, as a rule by one."""
        if self.work.over_base:
            drawn = members * self._vectors / self.device.noise
            return drawn + members * self.shape.tensors * (0 if self.device.is_gpu else CPU_PER_TENSOR)
        writing = self._live / self.device.bandwidth
        return members * self._passes * max(self._base / self._reading + writing, self.work.drawn * self._drawing)

    def update(self) -> float:
        """Seconds to update the base, or all bases on one device."""
        moved = 2 * self._base / self._reading
        if self.work.moments:
            moved += 2 * self.shape.trained * MOMENTS / self._reading
        alone = max(moved, (self.work.population + self.work.redrawn) * self._drawing)
        replicas = self.work.replicas
        return (
            alone / replicas if shares_base(self.work, self.device) else alone * (replicas if self.device.is_gpu else 1)
        )

    def read(self, prompts: int) -> float:
        """Seconds of the first forwards of so many prompts, which give their first tokens."""
        batches = self.batches(prompts)
        tokens = self.work.prompt_tokens
        rows = np.array(prompts / batches)
        return batches * float(self._forward(rows, tokens, tokens / 2, self.device.prefill, captured=False))

    def generate(self, lengths: Array) -> Array:
        """Seconds of all further tokens: rows leave the batch as they end, and it lasts until the longest ends.

        vLLM lets the next prompt in where one has ended; the transformers engine makes batches of equal size.

        Args:
            lengths: tokens of completions, `[members, prompts]`.

        Returns:
            Seconds, `[members]`.
        """
        if self.work.engine == "vllm":
            return self._decode(np.sort(finish(lengths - 1, self.work.rows)), lengths.mean() / 2)
        batches = np.array_split(lengths - 1, self.batches(lengths.shape[1]), axis=1)
        found: Array = np.sum([self._decode(np.sort(batch), math.inf) for batch in batches], axis=0)
        return found

    def token(self, rows: float, length: float) -> tuple[float, str]:
        """Seconds of a decoding step of so many rows of a length, and what takes most of them."""
        asked = np.array(rows), 1, self.work.prompt_tokens + length, self.device.decode
        reading, products, waiting, asking = self._parts(*asked, captured=self.work.captured)
        limits = {"memory bandwidth": reading, "arithmetic": products, "launching kernels": max(waiting, asking)}
        limit = max(limits, key=lambda name: float(limits[name]))
        return float(self._forward(*asked, captured=self.work.captured)), limit

    def batches(self, prompts: int) -> int:
        """How many batches so many prompts make; for vLLM one."""
        return 1 if self.work.engine == "vllm" else math.ceil(prompts / self.work.rows)

    @property
    def _drawing(self) -> float:
        """Seconds to make a member's noise of all that is trained."""
        elements = trained(self.shape, self.work)
        if rank := self.work.rank:
            return self._vectors / self.device.noise + rank * elements / self.device.outer
        return elements / self.device.noise

    def _beside_weights(self) -> tuple[int, int, int]:
        """Elements of a member that lie beside the weights, those that a token is multiplied by, and a row's choice."""
        shape = self.shape
        work = self.work
        if work.way == "slots":
            return shape.trained, shape.trained, 0
        if work.way == "low-rank slots":
            layers, beside = slot_elements(shape, work.rank)
            head = min(shape.sides - shape.layered, shape.vocabulary + shape.hidden)
            return layers + beside, layers, (work.together + 1) * work.rank * head  # those of all slots, in one product
        return (self._vectors, self._vectors, 0) if work.over_base else (0, 0, 0)

    def _decode(self, ends: Array, longest: float) -> Array:
        """Seconds to decode rows that end after these tokens, rising, `[members, rows]`; `[members]`.

        Texts are at most `longest` tokens long in the mean.
        """
        count = ends.shape[1]
        tokens = np.diff(ends, prepend=0)
        alive = np.minimum(count - np.arange(count), self.work.rows)
        grown = ends - tokens / 2
        if count > self.work.rows:  # rows that came later are shorter
            grown = np.minimum(grown, longest)
        context = self.work.prompt_tokens + grown
        seconds = self._forward(alive, 1, context, self.device.decode, captured=self.work.captured)
        found: Array = (tokens * seconds).sum(axis=1)
        return found

    def _forward(self, rows: Array, tokens: float, context: Any, rate: float, *, captured: bool) -> Array:
        """Seconds of forwards of `rows` sequences of `tokens` new tokens that look back on `context`.

        Of engines that share a GPU, one's kernels run while another's process does something else.
        """
        reading, products, waiting, asking = self._parts(rows, tokens, context, rate, captured=captured)
        running = np.maximum(reading, products) + waiting
        alone = np.maximum(running, asking) + (VLLM_STEP if self.work.engine == "vllm" and self.device.is_gpu else 0)
        found: Array = np.maximum(running, alone / (self.work.at_once if self.device.is_gpu else 1))
        return found

    def _parts(self, rows: Array, tokens: float, context: Any, rate: float, *, captured: bool) -> tuple[Any, ...]:
        """What a forward's seconds are made of: memory traffic, arithmetic, gaps between kernels, asking for kernels.

        A product of m x k by k x n is 2 m k n operations. Attention multiplies each query with all keys, and the
        weights that come out with all values.
        """
        shape = self.shape
        device = self.device
        if captured and self.work.engine == "transformers":  # rows of powers of two, slots of those or 1.5 times those
            rows = np.exp2(np.ceil(np.log2(rows)))
            context = context * GRAPH_SLOTS
        used = np.minimum(shape.matrices, shape.active * rows * tokens)
        read = self._bytes * (used + shape.output + rows * context * shape.cached)
        flops = 2 * rows * (shape.active * tokens + shape.output + tokens * context * shape.cached * shape.grouped)
        # Of each member what it adds is read once at least; a CPU, row by row, is not held up by that alone.
        read = read + self._bytes * np.minimum(rows, self.work.together) * self._added
        flops = flops + 2 * rows * (tokens * self._multiplied + self._chosen)
        waiting: Any = self._kernels * device.gap + device.per_layer * shape.layers
        if self.work.by_row and not device.is_gpu:
            waiting = waiting + 2 * rows * tokens * self._multiplied / device.outer
        if self.work.parallel > 1:
            waiting += 2 * EXCHANGE * shape.layers
        return read / device.bandwidth, flops / rate, waiting, 0 if captured else self._kernels * device.issue
