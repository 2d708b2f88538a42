"""Tiny models of every family that transformers knows, its own defaults made small, and what shows that one trains."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import estune
from estune.engines.loading import load_model
from estune.es.evolution import EvolutionStrategy
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.run.trainer import Trainer
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import trained_parameters
from estune.weights.places import check_places
from estune.weights.rebuild import Steps
from estune.weights.weights import Weights
from tests.models import VOCABULARY, build_tokenizer
from tests.runs import make_config, make_task

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
    "state_size": 8,
    "sliding_window": 16,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), None),
}
_HYBRID: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
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
    **{
        name: dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
        for name in ("cwm", "modernbert-decoder")
    },
    **{name: {"pad_token_id": 1} for name in ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm")},
    **{name: {"pad_token_id": 1} for name in ("xlm-roberta", "xlm-roberta-xl")},
}


# Sizes of what sees, in a vision-language model.
EYE: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "vision_output_dim", "projector_hidden_size"), 64),
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_heads", "num_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "mlp_dim"), 96),
    "projection_dim": 32,
    "image_size": 56,
    "patch_size": 14,
    "num_position_embeddings": 16,
}
LANGUAGE = ("text_config", "decoder", "llm_config", "language_config")


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a small model of a family, as random as they come, without special tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = CONFIG_MAPPING[family]()
        return type(usual)(**{**_small(usual, SMALL), "initializer_range": 0.2, **OWN.get(family, {}), **changes})


def tiny_vision_config(family: str) -> Any:
    """The configuration of a small vision-language model of a family."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = CONFIG_MAPPING[family]()
        parts = {name: getattr(usual, name, None) for name in usual.sub_configs}
        small = {
            name: type(part)(**{**_small(part, SMALL if name in LANGUAGE else EYE), **OWN.get(part.model_type, {})})
            for name, part in parts.items()
            if isinstance(part, PretrainedConfig)
        }
        marks = [name for name in usual.to_dict() if name.endswith(("token_id", "token_index"))]
        ids = {name: i for i, name in enumerate(marks, 5) if not name.startswith(("bos", "eos", "pad"))}
        return type(usual)(**{name: part.to_dict() for name, part in small.items()}, **ids)


def _small(usual: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a configuration has, made small."""
    values = usual.to_dict()
    small = {name: size for name, size in sizes.items() if name in values or hasattr(usual, name)}
    if "head_dim" in values:
        small["head_dim"] = 16
    if "kv_lora_rank" in values:  # of which all heads are made
        small["num_key_value_heads"] = 4
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(values.get(name), list):
            small[name] = [*values[name][:2], *values[name][-2:]]
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if isinstance(values.get(name), list):
            small[name] = [1]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        small["rope_parameters"] = {**rope, "mrope_section": [4, 2, 2]}
    return {**small, "initializer_range": 0.2} if "initializer_range" in values else small


def save_family(folder: Path, family: str) -> Path:
    """Write a small random model of a family with a tokenizer; return the directory."""
    return save_random(folder, AutoModelForCausalLM, tiny_config(family))


def save_random(folder: Path, kind: Any, config: Any) -> Path:
    """Write a random model of a configuration with a tokenizer; return the directory."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = kind.from_config(config).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def update_and_compare(folder: Path, model: Path) -> Checkpoint:
    """Update weights twice, and check that they are, under the checkpoint's names, what files alone come to.

    Returns:
        What they are written as.
    """
    base = Checkpoint(model)
    loaded = load_model(model, "auto", torch.device("cpu"))
    parameters = trained_parameters(loaded, base.tensors)
    check_places(parameters, base)
    held = {p.tensor.untyped_storage().data_ptr() for p in parameters}
    assert all(p.untyped_storage().data_ptr() in held for p in loaded.parameters())

    weights = Weights(parameters, policy="copy")
    strategy = EvolutionStrategy(population=2, sigma=0.1)
    updates = [strategy.tell([0.0, 1.0]) for _ in range(2)]
    for update in updates:
        weights.perturb(update.members[0], 0.1)
        weights.apply(update)
    weights.restore()
    base.write(folder / "ours", weights.runs(), "float32")

    rebuilt: list[str] = []
    Steps(weights.rule, updates).write(base, weights.tensors, folder / "rebuilt", "float32", rebuilt.append)
    assert rebuilt == [weights.fingerprint()]
    ours, theirs = Checkpoint(folder / "ours"), Checkpoint(folder / "rebuilt")
    assert ours.content_hash() == theirs.content_hash()
    assert {n: t.shape for n, t in ours.tensors.items()} == {n: t.shape for n, t in base.tensors.items()}
    again = load_model(folder / "ours", "auto", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
    return ours


def train_and_compare(folder: Path, model: Path, rows: Sequence[dict[str, Any]] = (), **changes: Any) -> Checkpoint:
    """Train two steps, and check what they leave behind: exact weights under the checkpoint's own names and shapes.

    Args:
        folder: where the run is written.
        model: the model's directory.
        rows: to train on, of which the first two are held out.
        changes: to the run's settings.

    Returns:
        The checkpoint of the last step.
    """
    config = make_config(folder / "run", model, **{"steps": 2, "population": 2, "prompts_per_step": 2, **changes})
    counted = itertools.count()

    def later(completions: list[str], **_: Any) -> list[float]:
        """A reward that differs, also where random models write the same."""
        return [float(next(counted)) for _ in completions]

    task = make_task(later)
    if rows:
        task = replace(task, train=rows[2:], evaluation=rows[:2])
    Trainer(config, task=task, monitors=[]).train()
    base, final = Checkpoint(model), Checkpoint(folder / "run" / "final")
    assert {n: t.shape for n, t in final.tensors.items()} == {n: t.shape for n, t in base.tensors.items()}
    trained = Journal.read(folder / "run").header.tensors
    still = [n for n in trained if (final.tensors[n].stored() == base.tensors[n].stored()).all()]
    assert not still, f"not moved: {still}"

    replay(folder / "run", folder / "replayed")  # from files alone, which refuses another fingerprint
    assert Checkpoint(folder / "replayed").content_hash() == final.content_hash()
    # What is trained is what the checkpoint loads as.
    ours = estune.load(folder / "run").state_dict()
    theirs = load_model(final.path, "auto", torch.device("cpu")).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    return final


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where the work takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
