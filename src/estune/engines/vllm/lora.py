"""Every contact with what vLLM has for adapters (LoRA): its settings, its layers, and the slots that these hold.

A LoRA layer holds the adapters of several requests side by side, in tensors `[slots, 1, rank, inputs]` and
`[slots, 1, outputs, rank]`, and multiplies each row of a batch by its own. `tests/vllm/test_contact.py` names all.

vLLM is imported by the functions that need it: importing this module does without.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from estune.engines.vllm import internals
from estune.errors import EstuneError, first_line
from estune.weights.adapted import adapted_shapes
from estune.weights.adapters import Adapter
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import fits

FIRST = 0
"""The first slot: of an adapter, that of the live weights, by which all is generated that is no batch of members."""

EXPERTS = "*.experts.*"
"""Of names of tensors that members in slots add nothing to."""

_PARTS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Place:
    """Where an adapter's tensor, or a stretch of its rows or columns, goes in vLLM's.

    Attributes:
        stacked: of all slots, `[slots, 1, rows, columns]`.
        source: `[rows, columns]`, no more of either than `stacked` has.
        scale: what vLLM multiplies it by before it is used.
    """

    stacked: Tensor
    source: Tensor
    scale: float

    def target(self, slot: int) -> Tensor:
        """The part of a slot that holds it."""
        rows, columns = self.source.shape
        return self.stacked[slot, 0, :rows, :columns]


def write(places: Sequence[Place], slot: int) -> None:
    """Write tensors into a slot, as vLLM does: rounded to its type, then scaled."""
    targets = [place.target(slot) for place in places]
    torch._foreach_copy_(targets, [place.source for place in places])
    for target, place in zip(targets, places, strict=True):
        if place.scale != 1.0:
            target.mul_(place.scale)  # not `_foreach_mul_`, which on a CPU rounds the factor to the tensor's type


def options(modules: Collection[str], rank: int, slots: int) -> dict[str, Any]:
    """What vLLM is told about adapters, as `vllm.LLM` takes it.

    Only these modules become LoRA layers: the head's would multiply by the whole vocabulary for each row.

    Args:
        modules: the ends of the modules' names.
        rank: of the adapters.
        slots: how many of them there can be at once.

    Raises:
        EstuneError: vLLM has no such rank.
    """
    internals.prepare()
    from vllm.config.lora import MaxLoRARanks

    most = next((known for known in sorted(get_args(MaxLoRARanks)) if known >= rank), None)
    if most is None:
        raise EstuneError(f"vLLM's LoRA has no rank {rank}, the most is {max(get_args(MaxLoRARanks))}")
    return {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": slots,
        "max_lora_rank": most,
        "lora_target_modules": sorted(modules),
    }


def options_of(adapter: Checkpoint, slots: int) -> dict[str, Any]:
    """As `options`, for adapters like the one in a checkpoint.

    Raises:
        EstuneError: vLLM cannot run such an adapter.
    """
    internals.prepare()
    from vllm.lora.peft_helper import PEFTHelper

    with refusing(adapter.path):
        other = next((name for name in adapter.tensors if not name.endswith(_PARTS)), None)
        if other is not None:
            raise EstuneError(f"vLLM's LoRA has no place for {other}")
        first = {name.removesuffix(_PARTS[0]): t for name, t in adapter.tensors.items() if name.endswith(_PARTS[0])}
        modules = {name.rpartition(".")[2] for name in first}
        found = options(modules, max(tensor.shape[0] for tensor in first.values()), slots)
        try:
            helper = PEFTHelper.from_local_dir(str(adapter.path), None)
            helper.validate_legal(_Legal(found["max_lora_rank"]))
        except (ValueError, TypeError, KeyError) as error:
            raise EstuneError(first_line(error)) from error
        return found


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """The matrices that LoRA layers are for, of a checkpoint's tensors: those of layers, but of no experts."""
    linear = {f"{module}.weight": shape for module, shape in adapted_shapes(shapes, Adapter()).items()}
    return {name: shape for name, shape in linear.items() if not fits(name, EXPERTS)}


def module_of(matrix: str) -> str:
    """The end of the name of the module that a matrix of a checkpoint is the weight of."""
    return matrix.rsplit(".", 2)[-2]


@dataclass(frozen=True)
class _Legal:
    """What vLLM's check of an adapter's settings reads of its own."""

    max_lora_rank: int


@contextmanager
def refusing(adapter: Path) -> Iterator[None]:
    """Within this, what vLLM has no way for is said of an adapter that is trained."""
    try:
        yield
    except EstuneError as error:
        raise EstuneError(f"engine=vllm cannot run adapter {adapter}: {error}; use engine=transformers") from error


def request(adapter: Path, slot: int, *, anew: bool = False) -> Any:
    """What a prompt carries to be completed by the adapter in a slot, which vLLM fills from the file at first.

    Args:
        adapter: its directory.
        slot: from 0 on.
        anew: fill it from the file whatever it holds.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"slot {slot}", slot + 1, str(adapter), load_inplace=anew)


def fill(llm: Any, adapter: Path, slot: int) -> None:
    """Have vLLM itself load an adapter into a slot.

    Raises:
        EstuneError: it cannot.
    """
    try:
        llm.llm_engine.add_lora(request(adapter, slot, anew=True))
    except Exception as error:  # of any kind, for an adapter that it cannot place
        raise EstuneError(first_line(error)) from error


def has_slots(worker: Any) -> bool:
    """Whether a worker has LoRA layers."""
    return worker.vllm_config.lora_config is not None


@contextmanager
def unwrapped(worker: Any) -> Iterator[None]:
    """Within this, the model has its own layers in place of LoRA's: its loader knows its parameters by their names."""
    if not has_slots(worker):
        yield
        return
    from vllm.lora.layers import BaseLayerWithLoRA

    wrapped = [
        (module, name, child)
        for module in worker.model_runner.get_model().modules()
        for name, child in module.named_children()
        if isinstance(child, BaseLayerWithLoRA)
    ]
    for module, name, child in wrapped:
        setattr(module, name, child.base_layer)
    try:
        yield
    finally:
        for module, name, child in wrapped:
            setattr(module, name, child)


def stacked(worker: Any) -> dict[str, Tensor]:
    """The tensors of all slots, by vLLM's names of the layers that hold them."""
    found: dict[str, Tensor] = {}
    for name, layer in _manager(worker).modules.items():
        for part in "ab":
            tensors = getattr(layer, f"lora_{part}_stacked", ())
            found |= {f"{name}.lora_{part.upper()}.{i}": tensor for i, tensor in enumerate(tensors)}
    return found


def indices(worker: Any) -> list[int]:
    """The place in the stacked tensors of each slot that is filled, in order."""
    numbers = _manager(worker).lora_index_to_id
    return [numbers.index(number) for number in sorted(filter(None, numbers))]


def places(worker: Any, adapter: Path, tensors: Mapping[str, Tensor]) -> list[Place]:
    """Where an adapter's tensors go in this worker's layers, which hold a part of each under tensor parallelism.

    Args:
        worker: vLLM's.
        adapter: the adapter's directory.
        tensors: the adapter's by PEFT's names, where they lie: `[rank, inputs]` and `[outputs, rank]`.

    Raises:
        EstuneError: a module has no LoRA layer, or one that lays out its adapter otherwise.
    """
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.utils import parse_fine_tuned_lora_name

    manager = _manager(worker)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = mapper and mapper.get_rename_mapper()
    helper = PEFTHelper.from_local_dir(str(adapter), None)
    parts: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    for name, tensor in tensors.items():
        module, is_a = parse_fine_tuned_lora_name(name, mapper)
        parts.setdefault(module, {})["A" if is_a else "B"] = tensor
        scales[module] = helper.get_rank_and_scaling(parse_fine_tuned_lora_name(name)[0])[1]
    found = []
    for name, layer in manager.modules.items():
        modules = manager.packed_modules.get(name, [name])
        held = [(scales.get(module, 1.0), parts.pop(module, {})) for module in modules]
        if any(pair for _, pair in held):
            found += _of_layer(name, layer, held)
    if parts:
        raise EstuneError(f"vLLM has no LoRA layer for {min(parts)}")
    return found


def _of_layer(name: str, layer: Any, held: list[tuple[float, dict[str, Tensor]]]) -> list[Place]:
    """The places of one layer, which is made of some modules, each with its scale and its tensors, if it has any."""
    a = [pair.get("A") for _, pair in held]
    b = [pair.get("B") for _, pair in held]
    stacked = getattr(layer, "lora_a_stacked", None)
    plain = isinstance(stacked, tuple) and len(stacked) == len(held)
    if plain and layer.tp_size > 1:  # by the layer's own rule
        alone = len(held) == 1
        a = [layer.slice_lora_a(a[0])] if alone else layer.slice_lora_a(a)
        b = [layer.slice_lora_b(b[0])] if alone else layer.slice_lora_b(b)
    mine = {t.untyped_storage().data_ptr() for _, pair in held for t in pair.values()}
    if not plain or any(t is not None and t.untyped_storage().data_ptr() not in mine for t in [*a, *b]):
        raise EstuneError(f"vLLM lays out the adapter of {name} in a way of its own")
    return [
        Place(stack, source, scale)
        for stacks, sources, scaled in ((layer.lora_a_stacked, a, False), (layer.lora_b_stacked, b, True))
        for stack, source, (own, _) in zip(stacks, sources, held, strict=True)
        if source is not None
        for scale in [own if scaled else 1.0]
    ]


def wrapper(runner: Any) -> Any:
    """What the LoRA layers of a worker's model ask for the slot of each row."""
    return next(iter(runner.lora_manager._adapter_manager.modules.values())).punica_wrapper


def _manager(worker: Any) -> Any:
    return worker.model_runner.lora_manager._adapter_manager


def refuse_type(dtype: str, device: torch.device) -> None:
    """Refuse types of weights that vLLM's kernels for adapters do not take.

    Raises:
        EstuneError: naming those that they take.
    """
    if device.type == "cuda" and dtype == "float32":
        raise EstuneError(
            "engine=vllm: on a GPU its kernels for adapters take bfloat16 and float16, and weights are float32: set "
            "dtype=bfloat16, or engine=transformers"
        )


def group_products() -> None:
    """Have vLLM multiply by adapters slot by slot on a CPU; see `cpu_lora.py`."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: "estune.engines.vllm.cpu_lora.BySlot")
