"""An engine over vLLM with what it trains: a model's own weights, or an adapter over them."""

from __future__ import annotations

import gc

import torch

from estune.config import Config
from estune.engines.loading import language_tensors, load_config
from estune.engines.memory import memory_for, total_memory
from estune.engines.vllm.adapted import AdapterWeights
from estune.engines.vllm.engine import VllmEngine, live_dtype, slots_for
from estune.engines.vllm.low_rank import LowRankWeights, Shapes, say_alone, slotted_tensors
from estune.engines.vllm.weights import VllmWeights
from estune.errors import EstuneError, first_line
from estune.weights.base import keeps_base_on_host
from estune.weights.checkpoint import Checkpoint
from estune.weights.device import chosen_device
from estune.weights.parameters import fits
from estune.weights.policies import BYTES, POLICIES
from estune.weights.quantized import quantized_by


def open_vllm(checkpoint: Checkpoint, config: Config) -> tuple[VllmEngine, VllmWeights]:
    """An engine over vLLM, with room for a base, and its weights. To generate alone, `VllmEngine` is enough.

    Members of low-rank noise are in slots where vLLM can; where it turns out that it cannot, it is started again.

    Raises:
        EstuneError: vLLM is missing or of an unknown version, or cannot run the model or train it.
    """
    outer = slotted_tensors(checkpoint, config, on_cpu=chosen_device(config.device).type == "cpu")
    if not outer:
        return _open(checkpoint, config, {})
    try:
        return _open(checkpoint, config, outer)
    except Exception as error:  # of any kind, from layers that do not fit the model
        why = first_line(error)
    gc.collect()  # what vLLM has loaded hung on the error
    torch.cuda.empty_cache()
    opened = _open(checkpoint, config, {})
    say_alone(why)
    return opened


def _open(checkpoint: Checkpoint, config: Config, outer: Shapes) -> tuple[VllmEngine, VllmWeights]:
    """As `open_vllm`, with slots for members that add to these tensors, if there are any."""
    device = chosen_device(config.device)
    whole = checkpoint.under
    if whole is not None and (method := quantized_by(whole.path)) is not None:
        raise EstuneError(
            f"engine=vllm: an adapter over quantised weights ({method}) is trained by engine=transformers: set it"
        )
    model = load_config(checkpoint.path, trust_remote_code=config.trust_remote_code)
    dtype = live_dtype(whole or checkpoint, config, model)
    spoken = language_tensors(checkpoint, trust_remote_code=config.trust_remote_code)
    pattern = config.train_parameters
    elements = sum(t.elements for n, t in checkpoint.tensors.items() if fits(n, pattern, spoken=n in spoken))
    live = sum(t.elements for t in (whole or checkpoint).stored.values()) * getattr(torch, dtype).itemsize
    policy = POLICIES[config.weights]
    if whole is None:
        beside = policy.base_bytes(elements, dtype)
    else:  # what is perturbed lies beside vLLM's slots, in every process
        beside = (policy.base_bytes(elements, "float32") + elements * BYTES["float32"]) * config.gpus_per_worker
    on_host = (
        policy.keeps_base
        and device.type == "cuda"
        and keeps_base_on_host(
            config.base_device,
            base=beside // config.gpus_per_worker,
            live=live // config.gpus_per_worker,
            memory=total_memory(device) // config.sharing,
        )
    )
    slots = slots_for(config, on_cpu=device.type == "cpu")
    engine = VllmEngine(checkpoint, config, 0 if on_host else beside, slots, outer)
    kind = AdapterWeights if whole is not None else LowRankWeights if outer else VllmWeights
    try:
        with memory_for("the base that is kept beside the live weights", "set base_device=host or weights=copy"):
            return engine, kind(engine, checkpoint, config, base_on_host=on_host)
    except BaseException:
        engine.close()
        raise
