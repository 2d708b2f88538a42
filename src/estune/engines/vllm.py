"""Generate with vLLM, its weights perturbed in place in all of its processes.

What vLLM holds is found by its own loader (`parameter_map.py`), checked bit for bit at the start, and perturbed by the
same kernels as any other weights: a member's weights are those of the transformers engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from estune.checkpoint import DTYPES, RUN_LENGTH, Checkpoint, narrow, widen
from estune.config import Config
from estune.engines import vllm_internals as internals
from estune.engines.base import Completion, Sampling
from estune.engines.loading import end_tokens, load_config, load_tokenizer, pick_dtype
from estune.engines.memory import memory_for, total_memory
from estune.engines.prompts import PromptEncoder
from estune.errors import EstuneError
from estune.noise.reference import normal_by_id, tensor_id
from estune.parameter_map import count_once, tied_names
from estune.place import chosen_device
from estune.storage import Array, keeps_base_on_host, type_name
from estune.strategy import Member, Update
from estune.weights import Drift, as_drift, as_fingerprint, as_norms

CPU_ROWS = 256  # sequences decoded at once on a CPU; beyond, caches lose more than larger products win
CPU_MEMORY_SHARE = 4  # of a CPU's memory beside weights and base, keys and values take at most one part in so many
CPU_BLOCK = 32  # tokens of a block of keys and values; prompts share whole blocks, and the kernels want multiples of 32
GPU_SHARE = 0.9  # of a GPU's memory, for weights, base, keys and values
PROBE = Member(0xC0FFEE), 0.01  # what live weights are compared under
STRONG = 0.05  # sigma under which completions have to be others
Digest = list[dict[int, float]]


class VllmEngine(PromptEncoder):
    """An `Engine` over vLLM. Same prompts and weights give the same greedy completions, the model's own.

    Use `open_vllm`.

    Args:
        checkpoint: the model's.
        config: the settings.
        base: bytes that are kept beside a model's live weights on its device, of all its processes together.
    """

    def __init__(self, checkpoint: Checkpoint, config: Config, base: int = 0) -> None:
        internals.check_version()
        self.device = chosen_device(config.device)
        if self.device.index:
            raise EstuneError(
                f"device={self.device}: vLLM takes the first GPU it sees; set CUDA_VISIBLE_DEVICES instead"
            )
        self._parallel, path = config.gpus_per_worker, checkpoint.path
        model = load_config(path)
        super().__init__(str(path), load_tokenizer(path), model, config.vllm_max_model_length)
        self.dtype = live_dtype(checkpoint, config, model)
        self.end_ids = end_tokens(
            SimpleNamespace(config=model, generation_config=_generation(checkpoint)), self.tokenizer
        )
        self._threads = config.threads or 1
        self._llm = self._start(checkpoint, config, base)

    def _here(self) -> Any:
        """vLLM's engine, set up for the thread that calls: its kernels for CPUs fail where OpenMP, which counts threads
        for each thread, and PyTorch do not agree on the number.
        """
        torch.set_num_threads(self._threads)
        return self._llm

    def _start(self, checkpoint: Checkpoint, config: Config, base: int) -> Any:
        on_cpu = self.device.type == "cpu"
        try:
            with memory_for("vLLM", "lower vllm_gpu_memory_utilization or vllm_max_model_length"):
                return internals.start(
                    checkpoint.path,
                    self.device,
                    self._parallel,
                    dtype=self.dtype,
                    max_model_len=config.vllm_max_model_length,
                    max_num_seqs=config.batch_size or (CPU_ROWS if on_cpu else None),
                    enforce_eager=on_cpu or not config.cuda_graphs,
                    enable_prefix_caching=True,
                    block_size=CPU_BLOCK if on_cpu else None,
                    kv_cache_memory_bytes=self._cache_bytes(checkpoint, config, base) if on_cpu else None,
                    gpu_memory_utilization=None if on_cpu else self._utilization(config, base),
                )
        except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            remedy = (
                "lower vllm_max_model_length or raise vllm_gpu_memory_utilization"
                if "KV cache" in why or "kv cache" in why
                else "use engine=transformers if vLLM does not know it"
            )
            raise EstuneError(f"vLLM cannot run model {self.name}: {why}; {remedy}") from error

    def _utilization(self, config: Config, base: int) -> float:
        if config.vllm_gpu_memory_utilization is not None:
            return config.vllm_gpu_memory_utilization
        left = GPU_SHARE / config.workers_per_gpu - base / self._parallel / total_memory(self.device)
        if left <= 0:
            raise EstuneError(
                f"the base that is kept beside the live weights takes {base / self._parallel / 2**30:.1f} GiB of the "
                "GPU, which leaves nothing for vLLM; set base_device=host, weights=copy or weights=inplace"
            )
        return left

    def _cache_bytes(self, checkpoint: Checkpoint, config: Config, base: int) -> int:
        """Room for the keys and values of as many full sequences as there can be, as far as memory goes."""
        text = self.config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        size = torch.empty(0, dtype=getattr(torch, self.dtype)).itemsize
        token: int = 2 * text.num_hidden_layers * max(heads // self._parallel, 1) * width * size
        length = math.ceil((self.positions or 2048) / CPU_BLOCK) * CPU_BLOCK + CPU_BLOCK
        weights = sum(t.elements for t in checkpoint.tensors.values()) * size
        room = (total_memory(self.device) - weights - base) // CPU_MEMORY_SHARE // self._parallel
        return int(max(min((config.batch_size or CPU_ROWS) * length * token, room), CPU_BLOCK * token))

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Raises:
            EstuneError: a prompt is empty or, with `max_new_tokens`, longer than the model's positions or
                `vllm_max_model_length` reach, or `sampling` is out of range.
        """
        if not prompt_ids:
            return []
        self.check(prompt_ids, sampling)
        ends, token_ids = set(self.end_ids), internals.generate(self._here(), prompt_ids, sampling, self.end_ids)
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [Completion(text, ids, finished=ids[-1] in ends) for text, ids in zip(texts, token_ids, strict=True)]

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability (nats) of the tokens of every completion, but of one that fills up the model's positions.

        To score a row vLLM needs room for a token more.
        """
        most = (self.positions or math.inf) - 1
        rows = [[*prompt, *ids] for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
        found = internals.score(self._here(), [row[: int(min(len(row), most))] for row in rows])
        return [row[len(prompt) - 1 :] for prompt, row in zip(prompt_ids, found, strict=True)]

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of each worker's `Shard`; their answers, by rank.

        Raises:
            EstuneError: what one of them raised.
        """
        answers = internals.call(self._here(), method, *args)
        for answer in answers:
            if isinstance(answer, EstuneError):
                raise answer
        return answers

    def forget(self) -> None:
        """Forget keys and values of earlier prompts, which other weights have made."""
        if not internals.reset_prefix_cache(self._llm):
            raise EstuneError("vLLM keeps keys and values of other weights: prompts are still under way; start again")

    def digest(self) -> Digest:
        """Likely tokens and their log probabilities for a few prompts: other weights, another digest."""
        size = self.config.get_text_config(decoder=True).vocab_size
        length = max(1, min(8, (self.positions or 8) - 2))
        prompts = [[(row * 7919 + i * 104729 + 13) % size for i in range(length)] for row in range(3)]
        self.forget()
        return internals.log_probabilities(self._here(), prompts, 2 if (self.positions or 8) > 2 else 1)

    def close(self) -> None:
        """End every process that it started."""
        if self._llm is not None:
            internals.stop(self._llm)
            self._llm = None


class VllmWeights:
    """The trained parameters of a vLLM engine, in all of its processes: as `Weights`, for what a replica asks of it.

    Args:
        engine: whose weights they are.
        checkpoint: which it was started with.
        config: the settings.
        base_on_host: keep the base of weights on a GPU in pinned host memory.

    Raises:
        EstuneError: vLLM's layout of the model cannot be trained, or its completions do not answer to the weights.
    """

    def __init__(self, engine: VllmEngine, checkpoint: Checkpoint, config: Config, *, base_on_host: bool) -> None:
        from estune.engines.vllm_worker import Opening

        self._engine, self._shapes = engine, {name: t.shape for name, t in checkpoint.tensors.items()}
        maps = dict(engine.call("draw", checkpoint.path))
        ranks = sorted(maps)
        counted = dict(zip(ranks, count_once([maps[rank] for rank in ranks], self._shapes), strict=True))
        places = [place for rank in ranks for place in maps[rank]]
        ties = tied_names(places, self._shapes, engine.config.get_text_config(decoder=True))
        self.tensors = {
            name: ties.get(name, [])
            for name in dict.fromkeys(place.name for place in places)
            if fnmatchcase(name, config.train_parameters)
        }
        """The trained tensors by checkpoint name, each with the names tied to it."""
        if not self.tensors:
            raise EstuneError(
                f"no parameter's name fits the pattern {config.train_parameters!r}; names look like "
                f"{next(iter(self._shapes))}"
            )
        chosen = {name: tuple(aliases) for name, aliases in self.tensors.items()}
        self._opening = Opening(
            checkpoint.path,
            config.weights,
            config.rounding,
            config.noise,
            config.threads or 1,
            base_on_host,
            chosen,
            counted,
        )
        engine.call("open", self._opening)
        self.dtype = "float32" if config.weights == "master" else engine.dtype
        """Type of the base weights."""
        self._check(checkpoint)

    @property
    def elements(self) -> int:
        """Elements of all trained tensors."""
        return sum(math.prod(self._shapes[name]) for name in self.tensors)

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the live weights base + sign * sigma * noise(seed). Needs no restore between members."""
        self._engine.call("perturb", member, sigma)
        self._engine.forget()

    def restore(self) -> None:
        """Make the live weights the base again: exactly, unless the policy is `inplace`."""
        self._engine.call("restore")
        self._engine.forget()

    def apply(self, update: Update) -> None:
        """Add an update to the base. The live weights follow at the next `perturb` or `restore`."""
        self._engine.call("apply", update)
        self._engine.forget()

    def fingerprint(self) -> str:
        """Hash of the base weights, 16 hexadecimal digits: that of `Weights` over the whole tensors."""
        return as_fingerprint(self.share_sum())

    def share_sum(self) -> int:
        """Sum of the hashes of the base's elements, each counted once."""
        return sum(self._engine.call("share_sum"))

    def drift(self) -> Drift:
        """How far the live weights of the `inplace` policy have drifted since the last update."""
        return as_drift(self._engine.call("drift_sums"))

    def load(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the base, such as one that an earlier part of the run saved."""
        self._engine.call("load", checkpoint.path)
        self._engine.forget()

    def show(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the live weights until the next `perturb` or `restore`."""
        self._engine.call("show", checkpoint.path)
        self._engine.forget()

    def change(self, checkpoint: Checkpoint) -> tuple[float, float]:
        """Norm of the base's difference from a checkpoint, and of the checkpoint's tensors themselves."""
        return as_norms(self._engine.call("change_sums", checkpoint.path))

    def runs(self) -> dict[str, Callable[[], Iterator[Array]]]:
        """The base by checkpoint name, tied names included, as `Checkpoint.write` takes it."""

        def reader(name: str) -> Callable[[], Iterator[Array]]:
            return lambda: self._gather(name)

        return {alias: reader(name) for name, aliases in self.tensors.items() for alias in (name, *aliases)}

    def _gather(self, name: str) -> Iterator[Array]:
        """A tensor's base, some `RUN_LENGTH` elements at a time, put together from what each process holds."""
        shape = self._shapes[name]
        columns = shape[-1] if len(shape) > 1 else 1
        rows, block = math.prod(shape) // max(columns, 1), max(1, RUN_LENGTH // max(columns, 1))
        for first in range(0, rows, block):
            count = min(block, rows - first)
            parts = list(itertools.chain.from_iterable(self._engine.call("rows", name, first, count)))
            whole = np.empty((count, columns), parts[0][2].dtype)
            for row, column, values in parts:
                whole[row - first : row - first + len(values), column : column + values.shape[1]] = values
            yield whole.reshape(-1)

    def _check(self, checkpoint: Checkpoint) -> None:
        """See that live weights are what they should be, and that it is they that generate."""
        engine, before = self._engine, self._engine.digest()
        self.perturb(*PROBE)
        samples = list(itertools.chain.from_iterable(engine.call("samples")))
        self._check_samples(checkpoint, samples)
        self.perturb(PROBE[0], STRONG)
        answers = engine.digest() != before
        self._undo(checkpoint)
        for name in engine.call("matrices")[0] if answers else ():
            engine.call("shake", name, STRONG)
            answers = engine.digest() != before
            engine.call("unshake", name, checkpoint.path)
            if not answers:
                raise EstuneError(
                    f"engine=vllm cannot train this model: completions do not answer to changes of {name}; use "
                    "engine=transformers"
                )
        if not answers or not _same(engine.digest(), before):
            found = "do not come back with the weights" if answers else "do not answer to changes of the weights"
            raise EstuneError(f"engine=vllm cannot train this model: completions {found}; use engine=transformers")

    def _check_samples(self, checkpoint: Checkpoint, samples: Sequence[Any]) -> None:
        member, sigma = PROBE
        for sample in samples:
            count, live = len(sample.values), DTYPES[sample.dtype.removeprefix("torch.")]
            base = checkpoint.tensors[sample.name].read(sample.start, count)
            if self._opening.policy != "master":
                base = widen(narrow(base, live))
            key = tensor_id(sample.name) if self._opening.noise == "iid" else 0
            noise = normal_by_id(member.seed, key, sample.start, count)
            if not np.array_equal(narrow(base + np.float32(sigma) * noise, live), sample.values):
                raise EstuneError(
                    f"engine=vllm cannot train this model: {sample.name}, perturbed, is not what it should be from "
                    f"element {sample.start} on; use engine=transformers"
                )

    def _undo(self, checkpoint: Checkpoint) -> None:
        self.restore()
        if self._opening.policy == "inplace":
            self.load(checkpoint)  # what rounding has left of the checks


def open_vllm(checkpoint: Checkpoint, config: Config, *, perturbs: bool) -> tuple[VllmEngine, VllmWeights | None]:
    """An engine over vLLM, and its weights, unless it only generates.

    Raises:
        EstuneError: vLLM is missing or of an unknown version, or cannot run the model or, if it `perturbs`, train it.
    """
    device = chosen_device(config.device)
    dtype = live_dtype(checkpoint, config, load_config(checkpoint.path))
    elements = sum(t.elements for name, t in checkpoint.tensors.items() if fnmatchcase(name, config.train_parameters))
    size = getattr(torch, dtype).itemsize
    base = elements * (4 if config.weights == "master" else size) if perturbs and config.weights != "inplace" else 0
    live = sum(t.elements for t in checkpoint.tensors.values()) * size
    on_host = device.type == "cuda" and keeps_base_on_host(
        config.base_device,
        base=base // config.gpus_per_worker,
        live=live // config.gpus_per_worker,
        memory=total_memory(device) // config.workers_per_gpu,
    )
    engine = VllmEngine(checkpoint, config, 0 if on_host else base)
    if not perturbs:
        return engine, None
    try:
        with memory_for("the base that is kept beside the live weights", "set base_device=host or weights=copy"):
            return engine, VllmWeights(engine, checkpoint, config, base_on_host=on_host)
    except BaseException:
        engine.close()
        raise


def live_dtype(checkpoint: Checkpoint, config: Config, model: Any) -> str:
    """The type that generates: float32, bfloat16 or float16."""
    picked = pick_dtype(config.dtype, chosen_device(config.device))
    if isinstance(picked, torch.dtype):
        return type_name(picked)
    if model.dtype is not None:
        return type_name(model.dtype) if isinstance(model.dtype, torch.dtype) else str(model.dtype)
    stored = {safetensors: name for name, safetensors in DTYPES.items()}
    return next((stored[t.dtype] for t in checkpoint.tensors.values() if t.dtype in stored), "float32")


def _generation(checkpoint: Checkpoint) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(checkpoint.path)
    except OSError:  # it has none
        return None


def _same(a: Digest, b: Digest) -> bool:
    """Whether two digests are of the same weights: a device may round a sum in another way from call to call."""
    return all(
        x.keys() == y.keys() and all(math.isclose(x[token], y[token], abs_tol=1e-2) for token in x)
        for x, y in zip(a, b, strict=True)
    )
