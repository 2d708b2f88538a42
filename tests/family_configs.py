"""The configurations of small models of every family that transformers knows: its own defaults, made small."""

from __future__ import annotations

import warnings
from typing import Any, get_args

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models import VOCABULARY

# Sizes under the names that families give them. What a family does not have is left out.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1024),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("out_hidden_size", "projector_hidden_size", "hidden_size_global"), 64),
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "is_decoder": True,
    "state_size": 8,
    "sliding_window": 16,
}
SPECIAL = {"pad_token_id", "bos_token_id", "eos_token_id"}
_HYBRID: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
# Layers that take keys and values of earlier ones.
_SHARING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
# What makes codes of pictures, whose norms are of 32 channels.
_CODES: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
_SAM: dict[str, Any] = {
    "output_channels": 32,
    "downsample_channels": [32, 64],
    "window_size": 2,
    "global_attn_indexes": [1],
}
# Families whose heads are turned by three positions, which their defaults do not say.
_TURNED = ("glm4v", "glm_ocr", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni")
# What is not enough for some.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **_HYBRID},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], **_HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 16},
    "codegen": {"rotary_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, **_HYBRID},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], **_HYBRID},
    "zaya": {"num_experts_per_tok": 1},
    **{name: {"pad_token_id": 1} for name in ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm")},
    **{name: {"pad_token_id": 1} for name in ("xlm-roberta", "xlm-roberta-xl")},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 5, **{f"IMGIMG{chr(65 + i)}Z": 300 + i for i in range(8)}}},
    "chameleon_vqgan": {**_CODES, "num_embeddings": 8, "latent_channels": 32},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {**_ROPE, "mrope_section": [4, 2, 2]} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_sam_vision_model": _SAM,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 3, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 4,
        "head_dim": 32,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "shared_experts_intermediate_size": 32,
    },
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4], "adapter_in_dim": 64, "moe_intermediate_size": 32},
    "dots3_note_audio_encoder": {"downsample_hidden_size": 32, "adapter_input_size": 64},
    "emu3": {"vocabulary_map": {"<image>": 5, **{f"<|visual token {i:06}|>": 300 + i for i in range(8)}}},
    "emu3_vqgan": {**_CODES, "hidden_size": 32, "codebook_size": 8},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 4]}},
    "fast_vlm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "hidden_size": 128,
            "model_args": {"inference_mode": True, "layers": [1] * 5, "embed_dims": [8, 16, 32, 32, 64]},
        }
    },
    "gemma3n_text": {**_SHARING, "laurel_rank": 8},
    "gemma3n_vision": {"hidden_size": 2048, "model_args": {"channel_multiplier": 0.05}},
    "gemma4_unified_text": {"pad_token_id": 0},
    **{f"{name}_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}} for name in _TURNED},
    **{
        f"{name}_thinker": {"vision_start_token_id": 20, "audio_start_token_id": 21}
        for name in ("qwen2_5_omni", "qwen3_omni_moe")
    },
    "kosmos_2_5_text_model": {"pad_token_id": 1},
    "llama4_text": {"intermediate_size_mlp": 96},
    "llama4_vision_model": {"projector_input_dim": 64, "projector_output_dim": 64},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "hunyuan_vl_text": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2, 3]},
    "gemma4_text": {**_SHARING, "pad_token_id": 0, "global_head_dim": 32},
    "glm5_next_text": {
        "qk_rope_head_dim": 0,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "index_topk": 8,
        "index_kpool": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 1]],
        "spatial_target_layers": [0, 1, 2, 3],
    },
    "janus_vqgan": {**_CODES, "num_embeddings": 8, "latent_channels": 32, "image_token_embed_dim": 64},
    "mistral4": {"head_dim": 32},
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "num_global_layers": 1, "vision_output_dim": 192},
    "molmo2": {"image_patch_id": 20},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_text": {"rope_scaling_layers": [0, 1, 2, 3], "additional_vocab_size": 8},
    "muse_spark_audio": {"hidden_sizes": [16, 32], "depths": [1, 1], "patch_sizes": [4, 4]},
    "muse_spark_text": {"moe_hidden_size": 32},
    **{f"muse_{name}_vision": {"pos_emb_height": 4, "pos_emb_width": 4} for name in ("glimmer", "spark")},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "nemotron_h_omni": {"vision_hidden_size": 64, "image_token_id": 5, "video_token_id": 6},
    "ovis2": {"visual_indicator_token_ids": [10, 11, 12, 13, 14]},
    "ovis2_vision": {"vocab_size": 32},
    "phi4_multimodal_audio": {
        "num_blocks": 2,
        **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel"), 64),
        "nemo_conv_channels": 16,
        "audio_token_id": 6,
    },
    "phi4_multimodal_vision": {"crop_size": 56},
    "qwen4_exp_text": {
        "eos_token_id": 0,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "split_ngram_parts": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "prophetnet": {"pad_token_id": 0},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_lang_large_patch14_448",
            "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": 56, "ref_feat_shape": [4, 4]},
        }
    },
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 56},
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [32, 32],
        "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "hash_seed": 0,
    },
    "step3p5": {"share_expert_dim": 32},
    "unlimited_ocr_sam_vision_model": _SAM,
    "xlm": {"emb_dim": 64, "n_heads": 4, "pad_token_id": 2},
    "xlnet": {"d_inner": 96, "d_head": 16},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX", "pad_token_id": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}


# Sizes of what sees, in a vision-language model.
EYE: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "vision_output_dim", "projector_hidden_size"), 64),
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_heads", "num_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "projection_intermediate_size"), 96),
    **dict.fromkeys(("text_hidden_size", "projection_hidden_dim", "adapter_out_dim"), 64),
    "posemb_grid_size": 4,
    "projection_dim": 32,
    "image_size": 56,
    "patch_size": 14,
    "num_position_embeddings": 16,
}

LANGUAGE = (
    "text_config",
    "decoder",
    "llm_config",
    "language_config",
    "patcher_config",
    "encoder_config",
    "decoder_config",
    "global_config",
)


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a small model of a family, as random as they come, without special tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _tiny(CONFIG_MAPPING[family](), SMALL, changes)


def _tiny(usual: Any, sizes: dict[str, Any], changes: dict[str, Any]) -> Any:
    """A configuration made small, and with it the configurations of its parts."""
    parts = {name: getattr(usual, name, None) for name in usual.sub_configs}
    small = {
        name: _tiny(part, SMALL if name in LANGUAGE else EYE, {}).to_dict()
        for name, part in parts.items()
        if isinstance(part, PretrainedConfig)
    }
    return type(usual)(**{**_small(usual, sizes), **small, **OWN.get(usual.model_type, {}), **changes})


def _small(usual: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a configuration has, made small."""
    values = usual.to_dict()
    known = values.keys() | usual.attribute_map
    small = {name: _like(values.get(name), size) for name, size in sizes.items() if name in known}
    if "head_dim" in values:
        small["head_dim"] = 16
    if "kv_lora_rank" in values:  # of which all heads are made
        small["num_key_value_heads"] = 4
    layers = values.get("num_hidden_layers")
    half = small.get("num_hidden_layers", 0) // 2
    for name, value in {**values, **small}.items():
        if half and isinstance(value, list) and len(value) == layers:  # one of each layer
            small[name] = [*value[:half], *value[-half:]]
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if isinstance(values.get(name), list | tuple):
            small[name] = [1]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        small["rope_parameters"] = {**rope, "mrope_section": [4, 2, 2]}
    fields = type(usual).__dataclass_fields__
    for name in SPECIAL & known:
        may_lack = name not in fields or type(None) in get_args(fields[name].type)
        small[name] = None if may_lack else 0
    marks = [name for name, value in values.items() if name.endswith(("token_id", "token_index")) and _is_far(value)]
    small |= {name: i for i, name in enumerate(marks, 5) if name not in SPECIAL}
    return {**small, "initializer_range": 0.2} if "initializer_range" in values else small


def _like(usual: Any, size: Any) -> Any:
    """A size in the form of the usual one, which can be one for each layer or direction."""
    return [size] * len(usual) if isinstance(usual, list | tuple) else size


def _is_far(token: Any) -> bool:
    """Whether a token's id lies outside of the small vocabulary."""
    return isinstance(token, int) and token >= VOCABULARY
