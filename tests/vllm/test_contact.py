"""Every internal of vLLM that estune touches: exists, and is called as it is to be called.

Where a new version of vLLM has changed one, this fails first, and says which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from estune.engines.vllm import internals


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_engine_takes_our_options() -> None:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    ours = {
        "model",
        "tokenizer",
        "skip_tokenizer_init",
        "generation_config",
        "tensor_parallel_size",
        "distributed_executor_backend",
        "worker_extension_cls",
        "use_tqdm_on_load",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "enforce_eager",
        "enable_prefix_caching",
        "block_size",
        "kv_cache_memory_bytes",
        "gpu_memory_utilization",
        "limit_mm_per_prompt",
    }
    assert ours <= set(parameters(EngineArgs))
    assert parameters(LLM.reset_prefix_cache) == ["self", "reset_running_requests", "reset_connector"]
    assert inspect.signature(LLM.reset_prefix_cache).return_annotation in (bool, "bool")
    assert parameters(LLM.collective_rpc)[:4] == ["self", "method", "timeout", "args"]


def test_the_engine_takes_prompts_one_by_one() -> None:
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    assert parameters(LLMEngine.add_request)[:4] == ["self", "request_id", "prompt", "params"]
    assert parameters(LLMEngine.abort_request)[:2] == ["self", "request_ids"]
    assert parameters(LLMEngine.step) == ["self"]
    assert parameters(LLMEngine.has_unfinished_requests) == ["self"]
    assert RequestOutputKind.DELTA
    assert RequestOutputKind.FINAL_ONLY


def test_the_engine_takes_pictures() -> None:
    from vllm.config import ModelConfig, MultiModalConfig
    from vllm.inputs import MultiModalInput, TokensPrompt
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    assert parameters(MultiModalConfig.get_limit_per_prompt) == ["self", "modality"]
    assert "multimodal_config" in parameters(ModelConfig)
    asked = {"prompt_token_ids", "multi_modal_data", "multi_modal_uuids"}
    assert asked <= TokensPrompt.__required_keys__ | TokensPrompt.__optional_keys__
    assert {"type", "prompt_token_ids"} <= MultiModalInput.__required_keys__
    for render in (BaseRenderer.render_cmpl, BaseRenderer.render_cmpl_async):
        assert parameters(render)[:2] == ["self", "prompts"]
    assert 'isinstance(prompt, dict) and "type" in prompt' in inspect.getsource(InputProcessor.process_inputs)
    for engine in (LLMEngine, AsyncLLM):
        assert parameters(engine.reset_encoder_cache) == ["self"]
        assert "self.renderer = " in inspect.getsource(engine.__init__)


def test_the_stream_of_a_thread_is_remembered_where_we_forget_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU vLLM puts a thread on a stream of its own, unless it remembers another."""
    from vllm.utils import torch_utils

    assert 'not hasattr(_current_stream_tls, "value") or _current_stream_tls.value is None' in inspect.getsource(
        torch_utils.current_stream
    )
    set_to: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "the default one")
    monkeypatch.setattr(torch.cuda, "set_stream", set_to.append)
    monkeypatch.setattr(torch_utils._current_stream_tls, "value", "one of vLLM's", raising=False)
    with pytest.raises(OSError, match="/nowhere"):
        internals.start(Path("/nowhere"), torch.device("cpu"), 1)
    assert set_to == ["the default one"]
    assert torch_utils._current_stream_tls.value is None
    monkeypatch.setattr(torch_utils._current_stream_tls, "value", "one of vLLM's")
    internals.stop(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=list))))
    assert len(set_to) == 2
    assert torch_utils._current_stream_tls.value is None


def test_sampling_takes_our_settings() -> None:
    from vllm import SamplingParams

    ours = {
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop_token_ids",
        "ignore_eos",
        "detokenize",
        "logprobs",
        "output_kind",
    }
    assert ours <= set(SamplingParams.__struct_fields__)


def test_the_engine_ends_its_processes() -> None:
    from vllm.v1.engine.core_client import InprocClient

    assert parameters(InprocClient.shutdown)[0] == "self"


def test_environment_variables_are_known() -> None:
    from vllm import envs

    for name in (
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_NO_USAGE_STATS",
        "VLLM_LOGGING_LEVEL",
        "VLLM_CPU_OMP_THREADS_BIND",
    ):
        assert name in envs.environment_variables
    assert "DO_NOT_TRACK" in inspect.getsource(envs) or "VLLM_DO_NOT_TRACK" in envs.environment_variables


def test_linear_layers_call_the_function_that_packs_by_its_module() -> None:
    """Replaced there, it is replaced for them."""
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    assert parameters(utils.dispatch_cpu_unquantized_gemm) == ["layer", "remove_weight"]
    text = "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm"
    for method in (linear.UnquantizedLinearMethod, vocab_parallel_embedding.UnquantizedEmbeddingMethod):
        assert text in inspect.getsource(method.process_weights_after_loading)
    assert "layer.cpu_linear(x, weight, bias)" in inspect.getsource(utils.cpu_unquantized_gemm)


def test_the_extension_is_imported_before_the_model_is_built_and_clashes_with_nothing() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    source = inspect.getsource(WorkerWrapperBase.init_worker)
    assert "resolve_obj_by_qualname(\n                parallel_config.worker_extension_cls" in source
    assert "load_model" not in source
    assert {"self", "vllm_config", "rank"} <= set(parameters(WorkerBase.__init__))
    for name in ("estune", "_estune_shard"):
        assert not hasattr(CPUWorker, name) or name == "estune"  # which it has once an engine has been started


def test_workers_hold_what_we_look_at(saved: Any, engines: Any) -> None:
    engine = engines(saved("qwen3"))

    def look(worker: Any) -> list[bool]:
        model, config = worker.model_runner.get_model(), worker.vllm_config.model_config
        return [
            callable(model.load_weights),
            config.quantization is None,
            config.use_mla is False,
            worker.rank == 0,
            all(hasattr(m, "cpu_linear") for n, m in model.named_modules() if n.endswith("_proj")),
        ]

    assert engine.llm.collective_rpc(look) == [[True] * 5]
    assert callable(engine.llm.llm_engine.engine_core.shutdown)


@pytest.mark.parametrize("platform", ["cpu"])
def test_the_platform_is_told(platform: str) -> None:
    from vllm.platforms import current_platform

    assert current_platform.device_type == platform


def test_a_server_takes_our_plugin() -> None:
    from vllm import envs
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, ENDPOINT_PLUGINS_GROUP
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from estune.pool.remote.plugin import Plugin
    from estune.pool.remote.wire import PATH

    assert (DEFAULT_PLUGINS_GROUP, ENDPOINT_PLUGINS_GROUP) == ("vllm.general_plugins", "vllm.endpoint_plugins")
    assert isinstance(Plugin(), EndpointPlugin)
    assert parameters(EndpointPlugin.init_state) == ["self", "engine_client", "state", "args"]
    assert PATH.startswith(GUARDED_PREFIX)
    assert "VLLM_API_KEY" in envs.environment_variables
    assert parameters(WeightTransferEngineFactory.register_engine) == ["name", "module_path_or_cls", "class_name"]
    assert parameters(WeightTransferEngine.__init__) == ["self", "config", "vllm_config", "device", "model"]
    abstract = {"init_transfer_engine", "start_weight_update", "receive_weights", "finish_weight_update", "shutdown"}
    assert WeightTransferEngine.__abstractmethods__ == abstract


def test_a_server_s_engine_is_called_as_we_do() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.worker.gpu_worker import Worker

    assert parameters(AsyncLLM.collective_rpc)[:4] == ["self", "method", "timeout", "args"]
    assert {"mode", "clear_cache"} <= set(parameters(AsyncLLM.pause_generation))
    assert parameters(AsyncLLM.resume_generation) == ["self"]
    assert parameters(AsyncLLM.reset_prefix_cache) == ["self", "reset_running_requests", "reset_connector"]
    assert parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert parameters(OutputProcessor.has_unfinished_requests) == ["self"]
    assert "self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(" in inspect.getsource(Worker)
    assert "general_plugins()" in inspect.getsource(__import__("vllm.v1.worker.worker_base").v1.worker.worker_base)


def test_adapters_are_taken_and_held_as_we_know() -> None:
    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora import model_manager
    from vllm.lora.layers import (
        BaseLayerWithLoRA,
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
        RowParallelLinearWithLoRA,
    )
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest
    from vllm.lora.utils import parse_fine_tuned_lora_name
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.v1.engine.llm_engine import LLMEngine

    ours = {"enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "lora_target_modules"}
    assert ours <= set(parameters(EngineArgs))
    assert parameters(LLMEngine.add_lora) == ["self", "lora_request"]
    assert "lora_request" in parameters(LLMEngine.add_request)
    assert 1 in get_args(MaxLoRARanks)
    assert {"lora_name", "lora_int_id", "lora_path", "load_inplace"} <= set(LoRARequest.__struct_fields__)
    assert parameters(PEFTHelper.from_local_dir) == ["lora_path", "max_position_embeddings"]
    assert parameters(PEFTHelper.get_rank_and_scaling) == ["self", "module_name"]
    checked = inspect.getsource(PEFTHelper.validate_legal)
    assert checked.count("lora_config.") == checked.count("lora_config.max_lora_rank")
    assert parameters(parse_fine_tuned_lora_name) == ["name", "weights_mapper"]
    assert "_adapter_manager" in inspect.getsource(LRUCacheWorkerLoRAManager.create_lora_manager)
    manager = inspect.getsource(model_manager.LoRAModelManager)
    assert all(f"self.{name}:" in manager for name in ("modules", "packed_modules", "lora_index_to_id"))
    assert "hf_to_vllm_mapper.get_rename_mapper()" in inspect.getsource(LRUCacheWorkerLoRAManager._load_adapter)
    for layer in (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
        RowParallelLinearWithLoRA,
    ):
        assert issubclass(layer, BaseLayerWithLoRA)
        assert any("self.base_layer = base_layer" in inspect.getsource(kind) for kind in layer.__mro__[:-2])
        assert parameters(layer.slice_lora_a) == ["self", "lora_a"]
        assert parameters(layer.slice_lora_b) == ["self", "lora_b"]
        made = inspect.getsource(layer.create_lora_weights)
        made += inspect.getsource(MergedColumnParallelLinearWithLoRA.create_lora_weights)
        assert "self.lora_a_stacked = tuple(" in made
        assert "self.lora_b_stacked = tuple(" in made


def test_products_of_adapters_on_a_cpu_are_asked_for_as_we_make_them() -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms import current_platform

    from estune.engines.vllm import worker  # noqa: F401  # which sets the name
    from estune.engines.vllm.cpu_lora import BySlot

    assert current_platform.get_punica_wrapper() == f"{BySlot.__module__}.{BySlot.__name__}"
    theirs = parameters(PunicaWrapperCPU.add_lora_linear)
    assert theirs[:7] == parameters(BySlot.add_lora_linear)[:7]
    assert parameters(PunicaWrapperBase.update_metadata)[:2] == ["self", "mapping"]
    assert isinstance(PunicaWrapperBase.token_lora_indices, property)


def test_modules_without_lora_layers_are_called_as_we_serve_them() -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.layers import base_linear
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.model_executor.layers import layernorm, linear, logits_processor, vocab_parallel_embedding
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from estune.engines.vllm import worker  # noqa: F401  # which has put its own in the place of vLLM's

    assert parameters(LoRAModelRunnerMixin.load_lora_model)[:3] == ["self", "model", "vllm_config"]
    assert "additional_config" in parameters(EngineArgs)
    assert "allowed_token_ids" in parameters(SamplingParams)
    assert isinstance(PunicaWrapperBase.sampler_indices, property)
    told = inspect.getsource(PunicaWrapperBase)
    assert "self._token_lora_indices[: base_indices.shape[0]].copy_(base_indices)" in told
    assert "token_lora_len = self.indices_len[0]" in told
    tables = vocab_parallel_embedding.UnquantizedEmbeddingMethod
    for method in (linear.UnquantizedLinearMethod, tables):
        assert parameters(method.apply) == ["self", "layer", "x", "bias"]
    assert parameters(tables.embedding) == ["self", "layer", "input_"]
    looked_up = inspect.getsource(vocab_parallel_embedding.VocabParallelEmbedding.forward)
    assert looked_up.count("self.quant_method.embedding(self, ") == 2
    assert "if self.use_fused_embedding:" in looked_up
    assert "return lm_head.quant_method.apply(" in inspect.getsource(logits_processor.LogitsProcessor._apply_head)
    for layer in (linear.ReplicatedLinear, linear.ColumnParallelLinear, linear.RowParallelLinear):
        assert "self.quant_method.apply(self, " in inspect.getsource(layer.forward)
    assert ".apply(self.base_layer, x, bias)" in inspect.getsource(base_linear.BaseLinearLayerWithLoRA._apply_sync)
    for norm in (layernorm.RMSNorm, layernorm.GemmaRMSNorm):
        assert parameters(norm.forward_native) == ["self", "x", "residual"]
    made = inspect.getsource(layernorm.RMSNorm.__init__)
    assert all(f"self.{name} = " in made for name in ("variance_epsilon", "variance_size_override", "has_weight"))
