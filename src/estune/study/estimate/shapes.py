"""What a model's `config.json` says about its size. No weights are read, and none are made."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from estune.errors import EstuneError, first_line
from estune.weights.adapted import adapter_elements
from estune.weights.adapters import Adapter
from estune.weights.checkpoint import Checkpoint
from estune.weights.coded import READ
from estune.weights.gguf import is_gguf
from estune.weights.locate import EMBEDDED, KNOWN, hub_name, locate
from estune.weights.parameters import fits, language_names
from estune.weights.quantized import KEPT, method_of, untrainable
from estune.weights.sizes import EXPERTS, check_sizes
from estune.weights.tensors import DTYPES


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one causal language model, in elements, not bytes."""

    parameters: int  # tied tensors once
    trained: int  # those that `train_parameters` names
    matrices: int  # in products with every token: not embeddings, and not the output matrix
    active: int  # of these, what one token uses: fewer where a layer holds several experts
    output: int  # the output matrix, which is used where a token is chosen
    cached: int  # keys and values that a token leaves in all layers together
    grouped: int  # query heads that share one key and value head
    layers: int
    hidden: int
    width: int  # the widest activation, as a rule the feed-forward layer's
    vocabulary: int
    kernels: int  # operations of a forward, each of which a GPU is asked for where nothing fuses them
    dtype: str | None  # of the checkpoint, as far as config.json tells
    heads: int = 0  # query heads of a layer; 0 where config.json does not tell
    matrix_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of the products' matrices, by name
    own: bool = False  # a CPU multiplies its matrices by our kernels, not PyTorch's
    integers: int = 0  # elements of trained matrices that can be integers
    stored: int | None = None  # bytes of the checkpoint's weights, where they are quantised and stay so
    tensors: int = 0  # that are trained
    sides: int = 0  # rows and columns of these
    flat: int = 0  # elements of these where they are of one dimension
    layered: int = 0  # of their rows and columns, those of matrices for which vLLM has LoRA layers
    slotted: bool = False  # vLLM has slots for members of low rank, as far as config.json tells
    joins: bool = False  # members of low rank can be decoded together, as far as config.json tells
    adapted: bool = False  # what is trained is an adapter, in float32

    def vectors(self, rank: int) -> int:
        """Elements of a member's vectors, of noise of this rank."""
        return rank * self.sides + self.flat

    def splits_over(self, gpus: int) -> bool:
        """Whether vLLM can give each GPU equally many query heads, and key and value heads, which it may repeat."""
        pairs = self.heads // self.grouped
        return not self.heads or (self.heads % gpus == 0 and (pairs % gpus == 0 or gpus % pairs == 0))


def read_shape(model: str | Path, pattern: str = "*", adapter: Adapter | None = None, *, bits: int = 0) -> Shape:
    """Sizes of a model given as an embedded name, a directory with `config.json` or a hub id.

    The model is built on torch's `meta` device, which has shapes but no memory, and reads two and then three tokens
    there: the difference of what it caches is a token's. For a hundred layers that takes seconds, so a process does it
    once.

    Args:
        model: as `--model`. For a hub id only the configuration is downloaded.
        pattern: `train_parameters`.
        adapter: that is trained in place of the model's own parameters.
        bits: of the integers that are trained; 0 where other weights are.

    Raises:
        EstuneError: there is no configuration, it is not of a causal language model, the pattern fits no name, or the
            weights are quantised, and neither they are trained as integers nor an adapter over them.
    """
    config = _read_config(model)
    method = method_of(config.to_dict())
    if method is not None and adapter is None and not (bits and method in READ):
        raise untrainable(model, method, coded=method in READ)
    dtype = _dtype(config)
    if dtype not in {None, *DTYPES}:
        raise EstuneError(f"model {model}: its weights are {dtype}; take one whose are one of {', '.join(DTYPES)}")
    try:
        kind: Any = type(config)
        config.name_or_path = ""  # of which no size depends
        shape = _lay_out(kind, config.to_json_string(use_diff=False), pattern if adapter is None else "*")
    except EstuneError:
        raise
    except Exception as error:  # whatever a model's own code raises
        why = first_line(error)
        raise EstuneError(
            f"model {model}: no causal language model can be laid out from its config.json ({why}); take one such as "
            "Qwen2ForCausalLM"
        ) from error
    if adapter is None and method is not None:  # the layers' matrices are integers, and no others
        integers = sum(math.prod(each) for name, each in shape.matrix_shapes.items() if fits(name, pattern))
        return replace(shape, trained=integers, integers=integers)
    if adapter is None:
        return shape
    if method in KEPT:
        shape = replace(shape, stored=_stored(model), own=False)
    added = adapter_elements(shape.matrix_shapes, adapter)
    return replace(
        shape,
        trained=added,
        parameters=shape.parameters + added,
        sides=min(shape.sides, added),
        flat=0,
        joins=False,
        adapted=True,
    )


@functools.lru_cache(maxsize=32)
def _lay_out(kind: Any, values: str, pattern: str) -> Shape:
    """The sizes of the model of a configuration, given by its class and as JSON."""
    import torch

    from estune.engines.cpu.fused import has_own_products
    from estune.engines.decode import unsupported
    from estune.engines.vllm import lora
    from estune.engines.vllm.low_rank import unslotted

    config = kind.from_dict(json.loads(values))
    dtype = _dtype(config)  # building changes it
    built, cached, kernels = _built(config)
    text = built.config.get_text_config(decoder=True)
    parameters = dict(built.named_parameters())
    spoken = language_names(built, parameters)
    named = {name: p for name, p in parameters.items() if fits(name, pattern, spoken=name in spoken)}
    chosen = named.values()
    trained = sum(p.numel() for p in chosen)
    if not trained:
        raise EstuneError(
            f"train_parameters: no parameter's name fits {pattern!r}; names look like {next(iter(parameters))}"
        )
    head = built.get_output_embeddings()
    output = head.weight if head is not None else None
    lookups = {id(m.weight) for m in built.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = {n: p for n, p in parameters.items() if p.ndim > 1 and p is not output and id(p) not in lookups}
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    layered = lora.matrices({name: tuple(p.shape) for name, p in parameters.items() if name in spoken})
    share = _active_experts(text)
    active = sum(p.numel() * (share if ".experts." in name else 1) for name, p in matrices.items())
    # Of layers that differ, a config refuses to tell what all would have: the first stands for them.
    layer = text.per_layer_config[0] if getattr(text, "is_heterogeneous", False) else text
    heads = getattr(layer, "num_attention_heads", None) or 0
    return Shape(
        parameters=sum(p.numel() for p in parameters.values()),
        trained=trained,
        matrices=sum(p.numel() for p in matrices.values()),
        active=int(active),
        output=output.numel() if output is not None else 0,
        cached=cached,
        grouped=max(1, heads // (getattr(layer, "num_key_value_heads", None) or heads or 1)),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        width=max((max(p.shape[-2:]) for p in matrices.values()), default=text.hidden_size),
        vocabulary=text.vocab_size,
        kernels=kernels,
        dtype=dtype,
        own=has_own_products(config, {min(p.shape[-2:]) for p in matrices.values()}, "float32"),
        heads=heads,
        integers=sum(p.numel() for p in chosen if p.ndim == 2),
        matrix_shapes={name: tuple(p.shape) for name, p in matrices.items()},
        tensors=len(chosen),
        sides=sum(p.numel() // p.shape[-1] + p.shape[-1] for p in chosen if p.ndim > 1),
        flat=sum(p.numel() for p in chosen if p.ndim < 2),
        layered=sum(sum(named[name].shape) for name in layered if name in named),
        slotted=unslotted(shapes, layered, speaks=len(spoken) == len(parameters)) is None,
        joins=not unsupported(built),
    )


def _built(config: Any) -> tuple[Any, int, int]:
    """The model of a configuration on `meta`, the elements that it caches of a token, and its forward's operations."""
    import torch
    from transformers.utils import logging

    from estune.engines.loading import kind_of

    kind = kind_of(config)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no word on missing kernels, which nothing here would use
    try:
        # In bfloat16, for the sake of expert layers, which transformers multiplies in that type alone.
        with torch.device("meta"):
            built: Any = kind.from_config(config, dtype=torch.bfloat16, trust_remote_code=False).eval()
        two = _cached(built, 2)
        with _counting() as kernels:
            three = _cached(built, 3)
    finally:
        logging.set_verbosity(verbosity)
    return built, three - two, kernels.count


def _stored(model: str | Path) -> int | None:
    """Bytes of a checkpoint's tensors, where its files are here."""
    path = Path(model)
    return sum(t.size for t in Checkpoint(path).stored.values()) if any(path.glob("*.safetensors")) else None


def _dtype(config: Any) -> str | None:
    return str(config.dtype).removeprefix("torch.") if config.dtype is not None else None


def _read_config(model: str | Path) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    path = locate(model) if is_gguf(model) else EMBEDDED.get(str(model), Path(model))
    if path.exists() and not (path / "config.json").is_file():
        kind = "a file" if path.is_file() else "a directory without config.json"
        raise EstuneError(f"model {model} is {kind}: give a checkpoint's directory, or one with its config.json alone")
    try:
        name, revision = (path, None) if path.exists() else hub_name(str(model))
        values, _ = PretrainedConfig.get_config_dict(name, revision=revision or "main")
        check_sizes(values)
        return AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # whatever a damaged file, or one made to do harm, makes transformers raise
        why = first_line(error)
        if path.exists():
            raise EstuneError(f"model {model}: its config.json cannot be used ({why})") from error
        raise EstuneError(
            f"model {model}: no such directory, nor is its config.json to be had from the hub ({why}); give a "
            f"directory, in which a config.json is enough, a hub id or one of: {KNOWN}"
        ) from error


def _cached(model: Any, tokens: int) -> int:
    """Elements that the model caches of one sequence of `tokens` tokens."""
    import torch
    from transformers import DynamicCache

    with torch.device("meta"), torch.inference_mode():
        cache = DynamicCache(config=model.config)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    held = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
    return sum(value.numel() for value in held if value.ndim > 1)


def _counting() -> Any:
    """A context whose `count` is the number of operations that write to memory, each of which launches a kernel.

    A view launches no kernel, nor does memory that is not filled.
    """
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            found = function(*args, **kwargs)
            new = memory(found) - memory((args, kwargs))
            self.count += function._schema.is_mutable or (bool(new) and "empty" not in function.__name__)
            return found

    def memory(values: Any) -> set[int]:
        return {leaf.untyped_storage()._cdata for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}

    return Counting()  # type: ignore[no-untyped-call]


def _active_experts(config: Any) -> float:
    """Share of a layer's experts that one token goes through."""
    experts = next((n for n in (getattr(config, name, None) for name in EXPERTS) if n), None)
    return (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
