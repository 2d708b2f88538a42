"""Decoding on a GPU: one step over buffers that never move, captured as a CUDA graph and replayed for every token.

A forward of a small or middling model launches its kernels more slowly than a GPU runs them. A captured graph launches
all of them at once. It repeats the same operations on the same addresses with the same shapes, so that

- everything a step needs that changes from token to token is on the device: tokens, positions, the slot to write, the
  mask, the step's number, the seed of sampling;
- weights are read from where they are: perturbed in place, they need no capture of their own, and one serves every
  member of every step;
- shapes are few: a batch starts with its rows rounded up a little, and falls to powers of two as rows end; attention
  reads the filled slots rounded up to 1 or 1.5 powers of two. What it reads beyond them is the price: beyond 256
  slots, a third of the keys and values at most and a sixth on average.

Prefilling is the plain loop's: its shapes vary, and it keeps a GPU busy as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from estune.completion import Sampling
from estune.engines.decode import Batch, Decoder
from estune.engines.progress import Meter
from estune.engines.sampling import choose
from estune.errors import EstuneError, first_line

WARM_UPS = 3
"""Steps of a shape that run before one is captured: libraries set themselves up in them, which a capture forbids."""
LEAST_SLOTS = 128
"""Fewest slots that attention reads."""

_MOVING_ROTATIONS = ("dynamic", "longrope")


def uncapturable(model: Any) -> str | None:
    """Why steps of `model`, one that `Decoder` serves, cannot be captured, or None."""
    for name, module in model.named_modules():
        kind = str(getattr(module, "rope_type", ""))
        if any(moving in kind for moving in _MOVING_ROTATIONS):
            return f"its rotary embedding, of type {kind}, follows the length of the text"
        if name.endswith(".experts"):
            return "its experts' shares of the rows may be read by the host, depending on type and device"
    return None


class Recorder(Protocol):
    """Captures a step's operations."""

    def warm(self, step: Callable[[], None]) -> None:
        """Run `step`, as it is captured later."""
        ...

    def record(self, step: Callable[[], None]) -> Callable[[], object]:
        """A call that repeats the device's part of `step`; `step`'s own operations are recorded, not run."""
        ...

    def forget(self) -> None:
        """Forget all recordings: none will be used again."""
        ...


class CudaRecorder:
    """CUDA graphs that share one memory pool.

    Sharing is safe in any order of replays, as long as they follow one another: a step leaves nothing in the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Warm-ups on the stream of the captures leave cuBLAS its workspace there, outside the pool.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, step: Callable[[], None]) -> None:
        """Run `step` on the side stream, between what came before and what comes after."""
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            step()
        main.wait_stream(self._stream)

    def record(self, step: Callable[[], None]) -> Callable[[], object]:
        """The replay of a new graph.

        Raises:
            EstuneError: the model does what cannot be captured, such as waiting for the device, or memory is short.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may grade on the device meanwhile: "thread_local" leaves them alone. Outside of inference
            # mode, as versions before 2.13 make the tensors of the device's random state when a capture begins, and
            # all graphs of the process write to them. A capture that fails does not leave its stream by itself.
            with (
                torch.cuda.stream(self._stream),
                torch.inference_mode(False),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
                torch.inference_mode(),
            ):
                step()
        except RuntimeError as error:
            # Not to be continued from: PyTorch's allocator stays in the state of a capture that has not ended.
            why = first_line(error.__context__ or error)
            full = isinstance(error, torch.OutOfMemoryError) or isinstance(error.__context__, torch.OutOfMemoryError)
            less = " or lower batch_size" if full else ""
            raise EstuneError(
                f"cuda_graphs: a decoding step cannot be captured ({why}); set cuda_graphs to false{less}"
            ) from error
        return graph.replay

    def forget(self) -> None:
        """Take a new pool: the allocator refuses one whose graphs are all gone but which is not yet empty."""
        self._pool = torch.cuda.graph_pool_handle()


class GraphDecoder(Decoder):
    """As `Decoder`, in static steps; a batch longer than a model's window takes the plain loop.

    Args:
        model: one for which `unsupported` and `uncapturable` find no reason.
        end_ids: as `Decoder`.
        pad_id: as `Decoder`.
        recorder: captures steps; None runs the same steps operation by operation.
    """

    def __init__(self, model: Any, end_ids: Sequence[int], pad_id: int, recorder: Recorder | None) -> None:
        super().__init__(model, end_ids, pad_id)
        self.recorder = recorder
        self.least_slots = LEAST_SLOTS
        self.buffers = _Buffers.make(0, 0, 0, model)
        self._warmed: dict[_Shape, int] = {}
        self.replays: dict[_Shape, Callable[[], object]] = {}
        self._addresses: list[int] = []
        self._vectors = 0  # address of the members' that captures read, if there are any

    def _open(self, batch: Batch) -> None:
        if not batch.plain:
            super()._open(batch)
            return
        rows = first_rows(len(batch.pads))
        slots = round_up(batch.slots, self.least_slots)
        # Attention multiplies what lies in slots not yet written by 0: it must be a number.
        self.cache.open(rows, slots, blank=True)

    def _decode(self, batch: Batch, token: torch.Tensor, sampling: Sampling, meter: Meter) -> torch.Tensor:
        if not batch.plain:
            return super()._decode(batch, token, sampling, meter)
        count = len(token)
        new = sampling.max_new_tokens
        rows = first_rows(count)
        slots = round_up(batch.slots, self.least_slots)
        bias = self._load(batch, token, sampling, rows, slots)
        self._forget_if_moved()
        buffers = self.buffers
        held = count  # the first so many rows are prompts'; the others are there for the shape
        alive = count
        meter.wrote(alive)
        rule = dataclasses.replace(sampling, max_new_tokens=0, seed=0)
        for step in range(1, new):
            filled = batch.width + step - 1
            if step % self.check_every == 0:
                left = held - int(buffers.ended[:held].sum())
                meter.wrote(0, spared=(alive - left) * (new - step))
                alive = left
                if left == 0:
                    break
                if power_of_two(left) < rows:
                    self.cache.at(slice(0, held), filled)
                    keep = self._drop(buffers.ended[:held], left)
                    for tensor in (*buffers.by_row(), bias):
                        tensor[:left] = tensor[keep]
                    buffers.place[left:rows] = buffers.nowhere
                    held = left
                    rows = power_of_two(left)
            together = batch.owners is not None
            self.advance(_Shape(rows, round_up(filled + 1, self.least_slots), slots, rule, together))
            meter.wrote(alive)
        return buffers.out[:new, :count].T.clone()

    def _load(self, batch: Batch, token: torch.Tensor, sampling: Sampling, rows: int, slots: int) -> torch.Tensor:
        """Fill the buffers for a batch's first step; return the mask `[rows, slots]`."""
        count = len(token)
        width = batch.width
        if not self.buffers.hold(rows, slots, sampling.max_new_tokens):
            self.buffers = self.buffers.larger(rows, slots, sampling.max_new_tokens, self.model)
        buffers = self.buffers
        buffers.token[:rows] = 0
        buffers.token[:count] = token
        buffers.position[:rows] = 0
        buffers.position[:count] = batch.next_positions()
        buffers.prompt[:count] = batch.rows
        buffers.owner[:rows] = 0
        if batch.owners is not None:
            buffers.owner[:count] = batch.owners
        buffers.place[:rows] = buffers.nowhere
        buffers.place[:count] = torch.arange(count, device=self._device)
        buffers.ended[:count] = self._is_end(token)
        bias = buffers.mask(rows, slots)
        bias[:, :width] = 0
        bias[:, width:] = torch.finfo(bias.dtype).min
        if batch.bias is not None:
            bias[:count, :width] = batch.bias[:, 0, 0, :width]
        buffers.out[0, :count] = token
        buffers.slot.fill_(width)
        buffers.step.fill_(1)
        buffers.seed.fill_((sampling.seed + 2**63) % 2**64 - 2**63)  # its 64 bits, as a signed number
        return bias

    def _step(self, shape: _Shape) -> None:
        """Add a token to every row. Nothing here may depend on a Python value that is not the shape's."""
        buffers = self.buffers
        rows = shape.rows
        bias = buffers.mask(rows, shape.slots).index_fill_(1, buffers.slot, 0.0)
        self.cache.fix(rows, shape.visible, buffers.slot)
        logits = self.forward(
            buffers.token[:rows, None],
            buffers.position[:rows],
            bias[:, None, None, : shape.visible],
            buffers.owner[:rows] if shape.together else None,
        )
        token = choose(logits, shape.rule, buffers.prompt[:rows], buffers.step, buffers.seed)
        buffers.token[:rows] = token
        buffers.ended[:rows].logical_or_(self._is_end(token))
        buffers.out.index_put_((buffers.step, buffers.place[:rows]), token)
        for counter in (buffers.position, buffers.slot, buffers.step):
            counter.add_(1)

    def advance(self, shape: _Shape) -> None:
        """Run a step: replayed if its shape is captured, else warming up or capturing it."""
        step = functools.partial(self._step, shape)
        if self.recorder is None:
            step()
        elif shape in self.replays:
            self.replays[shape]()
        elif self._warmed.get(shape, 0) < WARM_UPS:
            self._warmed[shape] = self._warmed.get(shape, 0) + 1
            self.recorder.warm(step)
        else:
            self.replays[shape] = self.recorder.record(step)
            self.replays[shape]()

    def _forget_if_moved(self) -> None:
        """Drop all captures if a tensor that they read or write has moved."""
        held = (*self.model.parameters(), *self.model.buffers(), *self.cache.storage.values(), *self.buffers.all())
        addresses = [tensor.data_ptr() for tensor in held]
        if self._members is not None:
            self._vectors = self._members.together.storage.data_ptr()
        addresses.append(self._vectors)
        if addresses != self._addresses and self.recorder is not None:
            self.replays.clear()
            self._warmed.clear()
            self.recorder.forget()
        self._addresses = addresses


class _Shape(NamedTuple):
    """What a captured step is made for."""

    rows: int
    visible: int  # slots that attention reads
    slots: int  # slots a row of the cache has: they set its strides
    rule: Sampling  # without seed and length
    together: bool = False  # its rows are several members'


@dataclasses.dataclass(frozen=True, slots=True)
class _Buffers:
    """What steps read and write beside weights and cache, for as many rows as there ever were."""

    token: torch.Tensor  # [rows] the last token
    position: torch.Tensor  # [rows, 1] its position
    prompt: torch.Tensor  # [rows] number of the prompt, for sampling
    owner: torch.Tensor  # [rows] the member whose weights decode the row
    place: torch.Tensor  # [rows] column of `out`
    ended: torch.Tensor  # [rows]
    bias: torch.Tensor  # flat: [rows, slots] of any batch, 0 or the lowest number
    out: torch.Tensor  # [new tokens, rows + 1]: completions as they grow, and a last column for rows without prompt
    slot: torch.Tensor  # [1] where keys and values of the last token go
    step: torch.Tensor  # [1] row of `out` that is next
    seed: torch.Tensor  # [1]

    @classmethod
    def make(cls, rows: int, new: int, mask: int, model: Any) -> _Buffers:
        """Buffers for so many rows, new tokens, and elements of the mask."""
        whole = functools.partial(torch.zeros, dtype=torch.int64, device=model.device)
        return cls(
            token=whole(rows),
            position=whole(rows, 1),
            prompt=whole(rows),
            owner=whole(rows),
            place=whole(rows),
            ended=whole(rows, dtype=torch.bool),
            bias=whole(mask, dtype=model.dtype),
            out=whole(new, rows + 1),
            slot=whole(1),
            step=whole(1),
            seed=whole(1),
        )

    def hold(self, rows: int, slots: int, new: int) -> bool:
        return len(self.token) >= rows and len(self.out) >= new and len(self.bias) >= rows * slots

    def larger(self, rows: int, slots: int, new: int, model: Any) -> _Buffers:
        """Buffers that hold what these do and a batch of so many rows, slots and new tokens."""
        return _Buffers.make(
            max(rows, len(self.token)), max(new, len(self.out)), max(rows * slots, len(self.bias)), model
        )

    @property
    def nowhere(self) -> int:
        """The column of `out` that nobody reads."""
        return len(self.token)

    def mask(self, rows: int, slots: int) -> torch.Tensor:
        return self.bias[: rows * slots].view(rows, slots)

    def by_row(self) -> list[torch.Tensor]:
        """What moves with a row."""
        return [self.token, self.position, self.prompt, self.owner, self.place, self.ended]

    def all(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def first_rows(count: int) -> int:
    """Rows that a batch of `count` prompts starts with: a multiple of 8, or a power of two below."""
    return power_of_two(count) if count <= 8 else -(-count // 8) * 8


def round_up(slots: int, least: int) -> int:
    """The next of least, 2 least, 3 least, 4 least, 6 least, 8 least and so on: powers of two and 3/4 of them."""
    power = max(least, power_of_two(slots))
    return power * 3 // 4 if power > 2 * least and slots <= power * 3 // 4 else power
