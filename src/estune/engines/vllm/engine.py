"""Generate with vLLM, its weights perturbed in place in all of its processes.

What vLLM holds is found by its own loader (`parameter_map.py`), checked bit for bit at the start, and perturbed by the
same kernels as any other weights: a member's weights are those of the transformers engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.engines.continuous import Request, Rows
from estune.engines.loading import generation_config, load_config, open_vision, pick_dtype
from estune.engines.memory import attends_everywhere, cached_elements, known_cache, memory_for, total_memory
from estune.engines.progress import Meter
from estune.engines.tokenizer import end_tokens, load_tokenizer
from estune.engines.vllm import additions, internals, lora
from estune.engines.vllm.calls import Digest, VllmCalls
from estune.errors import EstuneError
from estune.weights.checkpoint import Checkpoint
from estune.weights.device import chosen_device
from estune.weights.policies import BYTES
from estune.weights.storage import type_name
from estune.weights.tensors import DTYPES

CPU_ROWS = 256  # sequences decoded at once on a CPU; beyond, caches lose more than larger products win
CPU_MEMORY_SHARE = 4  # of a CPU's memory beside weights and base, keys and values take at most one part in so many
BLOCK = 32  # tokens of a block of keys and values; prompts share whole blocks, and a CPU wants multiples of 32
GPU_ROWS = (256, 1024)  # sequences decoded at once on a GPU: as many as a step has prompts, within these
MOST_SLOTS = 32  # members in slots that are decoded at once, if the settings do not say: their products are small
OUTER = Path("outer products")  # the path of adapters that slots hold without any file
GPU_SHARE = 0.9  # of a GPU's memory, for weights, base, keys and values
REMEDIES = {  # by what vLLM says
    "free memory on device": "end what else uses the GPU or lower vllm_gpu_memory_utilization",
    "kv cache": "lower vllm_max_model_length or raise vllm_gpu_memory_utilization",
}
REMEDY = "use engine=transformers if vLLM does not know it"


class VllmEngine(VllmCalls):
    """An `Engine` over vLLM. Same prompts and weights give the same greedy completions, the model's own.

    To train, use `open_vllm` (`open.py`).

    Args:
        checkpoint: the model's.
        config: the settings.
        base: bytes of the base that lies beside the live weights on their device, in all processes together.
        slots: members that can be generated with at once, where the checkpoint is an adapter's or tensors are given.
        outer: shapes of the tensors, by the checkpoint's names, to which members in slots add noise of low rank.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Config,
        base: int = 0,
        slots: int = 1,
        outer: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        internals.check_version()
        self.device = chosen_device(config.device)
        if self.device.index:
            raise EstuneError(
                f"device={self.device}: vLLM takes the first GPU it sees; set CUDA_VISIBLE_DEVICES instead"
            )
        self.parallel = config.gpus_per_worker
        whole = checkpoint.under
        self._adapter = None if whole is None else checkpoint.path  # whose slot is the live weights
        self.slots = 0 if whole is None and not outer else slots
        """How many members can be generated with at once; 0 where vLLM has no slots for them."""
        path = checkpoint.path
        model = load_config(path, trust_remote_code=config.trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
        vision = open_vision(path, model, trust_remote_code=config.trust_remote_code)
        super().__init__(str(path), tokenizer, model, config.vllm_max_model_length, vision=vision)
        self.dtype = live_dtype(whole or checkpoint, config, model)
        self._slot_elements = 0
        options: dict[str, Any] = {}
        if self.slots:
            lora.refuse_type(self.dtype, self.device)
        if whole is not None:
            self._slot_elements = sum(t.elements for t in checkpoint.tensors.values())
            options = lora.options_of(checkpoint, slots)
        elif outer:
            matrices = lora.matrices(outer)
            others = [shape for name, shape in outer.items() if name not in matrices]
            options = lora.options({lora.module_of(name) for name in matrices}, config.noise_rank, slots)
            options |= additions.options(config.noise_rank) if others else {}
            self._slot_elements = options["max_lora_rank"] * sum(map(sum, [*matrices.values(), *others]))
        self.end_ids = end_tokens(
            SimpleNamespace(config=model, generation_config=generation_config(path, model)), self.tokenizer
        )
        self._threads = config.threads or 1
        self.llm = self._start(whole or checkpoint, config, base, options)
        # With several processes, each has one thread that does everything, and this process does nothing on the device.
        module = torch.get_device_module(self.device)
        self.stream = module.current_stream() if self.parallel == 1 else None
        """Of the device, on which vLLM was started."""

    @contextmanager
    def here(self) -> Iterator[Any]:
        """vLLM's engine, set up for the calling thread, whichever thread has started it.

        On a GPU, vLLM's runner waits for the stream on which it was started, and each thread has a stream of its own:
        another thread must perturb and generate on vLLM's stream. On a CPU, vLLM's kernels fail where OpenMP, which
        counts threads for each thread, and PyTorch do not agree on the number.
        """
        torch.set_num_threads(self._threads)
        with torch.get_device_module(self.device).stream(self.stream):
            yield self.llm

    def _start(self, checkpoint: Checkpoint, config: Config, base: int, options: dict[str, Any]) -> Any:
        on_cpu = self.device.type == "cpu"
        rows = rows_at_once(config, on_cpu=on_cpu, members=self.slots or 1)
        share = None if on_cpu else self._utilization(config, base)
        try:
            with memory_for("vLLM", "lower vllm_gpu_memory_utilization or vllm_max_model_length"):
                return internals.start(
                    checkpoint.path,
                    self.device,
                    self.parallel,
                    sees=self.vision is not None,
                    dtype=self.dtype,
                    trust_remote_code=config.trust_remote_code,
                    max_model_len=None if config.vllm_max_model_length is None else self.positions,
                    max_num_seqs=rows,
                    enforce_eager=on_cpu or not config.cuda_graphs,
                    enable_prefix_caching=True,
                    block_size=BLOCK if on_cpu else None,
                    kv_cache_memory_bytes=self.cache_bytes(checkpoint, rows, base, share),
                    gpu_memory_utilization=share,
                    **options,
                )
        except EstuneError:
            raise
        except Exception as error:  # of any kind, for a model that it does not know or a build that does not fit
            why = " ".join(str(error).split()) or type(error).__name__
            remedy = next((do for found, do in REMEDIES.items() if found in why.lower()), REMEDY)
            raise EstuneError(f"vLLM cannot run model {self.name}: {why}; {remedy}") from error

    def _utilization(self, config: Config, base: int) -> float:
        if config.vllm_gpu_memory_utilization is not None:
            return config.vllm_gpu_memory_utilization
        left = GPU_SHARE / config.sharing - base / self.parallel / total_memory(self.device)
        if left <= 0:
            raise EstuneError(
                f"the base that is kept beside the live weights takes {base / self.parallel / 2**30:.1f} GiB of the "
                "GPU, which leaves nothing for vLLM; set base_device=host, weights=copy or weights=exact_inplace"
            )
        return left

    def cache_bytes(self, checkpoint: Checkpoint, rows: int, base: int, share: float | None) -> int | None:
        """Bytes for the keys and values of `rows` full sequences, the most that there can be.

        Args:
            checkpoint: the model's.
            rows: sequences at once.
            base: bytes of the base, of all processes together.
            share: the share of a GPU's memory that vLLM may take; None on a CPU, whose memory alone is the limit.

        Returns:
            Bytes on each device; None where vLLM is to measure what room there is.
        """
        size = BYTES[self.dtype]
        token = cached_elements(self.config, self.parallel) * size
        length = math.ceil((self.positions or 2048) / BLOCK) * BLOCK + BLOCK
        weights = sum(t.elements for t in checkpoint.stored.values()) * size
        weights += self.slots * self._slot_elements * size
        memory = total_memory(self.device)
        if share is not None:
            plain = attends_everywhere(self.config)
            return known_cache(rows * length * token, weights // self.parallel, int(share * memory)) if plain else None
        room = (memory - weights - base) // CPU_MEMORY_SHARE // self.parallel
        return int(max(min(rows * length * token, room), BLOCK * token))

    def slot(self, number: int) -> Any:
        """What a prompt carries to be completed by a slot, which is filled."""
        return lora.request(self._adapter or OUTER, number)

    @property
    def live(self) -> Any:
        """What a prompt carries to be completed by the live weights."""
        return None if self._adapter is None else self.slot(lora.FIRST)

    def _tokens(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        with self.here() as llm:
            return internals.generate(llm, prompt_ids, sampling, self.end_ids, [self.live])

    def generate_each(
        self, count: int, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """As `generate`, by each of the first slots, `[count][prompts]`, in one batch."""
        slots = [self.slot(number) for number in range(count)]

        def work() -> list[list[int]]:
            with self.here() as llm:
                return internals.generate(llm, prompt_ids, sampling, self.end_ids, slots)

        found = self._complete(prompt_ids, sampling, work, members=count)
        size = len(prompt_ids)
        return [found[number * size : (number + 1) * size] for number in range(count)]

    def fill(self, adapter: Checkpoint, slot: int) -> None:
        """Have vLLM itself load an adapter into a slot.

        Raises:
            EstuneError: it cannot.
        """
        with self.here() as llm:
            lora.fill(llm, adapter.path, slot)

    def open_rows(self) -> Rows:
        """An empty batch."""
        return VllmRows(self)

    def _scores(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        with self.here() as llm:
            return internals.score(llm, rows, self.live)

    def scores_in(self, slots: Sequence[int | None], rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities (nats) of each row's tokens but the first, by what is in its slot; by the base for None."""
        with self.here() as llm:
            return internals.score_each(llm, rows, [None if slot is None else self.slot(slot) for slot in slots])

    def digest_in(self, slot: int) -> Digest:
        """As `digest`, by what is in a slot. What was computed by other contents has to be forgotten."""
        with self.here() as llm:
            return internals.log_probabilities(llm, self.probes(8), 1, self.slot(slot))

    def _likely(self, prompt_ids: Sequence[Sequence[int]], tokens: int) -> Digest:
        with self.here() as llm:
            return internals.log_probabilities(llm, prompt_ids, tokens, self.live)

    def _call(self, method: str, *args: Any) -> list[Any]:
        with self.here() as llm:
            return internals.call(llm, method, *args)

    def _reset(self) -> bool:
        with self.here() as llm:
            if self.vision is not None:
                internals.reset_encoder_cache(llm)
            return internals.reset_prefix_cache(llm)

    def close(self) -> None:
        """End every process that the engine has started."""
        if self.llm is not None:
            internals.stop(self.llm)
            self.llm = None


class VllmRows:
    """As `Rows`: vLLM's own batch, which prompts join and leave at any token.

    Args:
        engine: whose batch it is, and whose weights stay as they are.
    """

    most_idle: float | None = None

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._unread: dict[int, int] = {}  # tokens of prompts that have gained nothing yet
        self._active: set[int] = set()  # rows that vLLM decodes
        self._meter = Meter()

    def join(self, request: Request) -> int:
        """As `Rows.join`. Where there is no room, vLLM lets prompts wait."""
        row = next(self._numbers)
        if not self._active:
            self._meter = Meter()  # nobody waited for anything
        with self._engine.here() as llm:
            adapter = self._engine.live
            internals.add(llm, str(row), request.prompt_ids, request.sampling, self._engine.end_ids, adapter)
        self._active.add(row)
        self._unread[row] = len(request.prompt_ids)
        return row

    def step(self) -> list[tuple[int, list[int]]]:
        """As `Rows.step`."""
        with self._engine.here() as llm:
            gained = internals.step(llm)
        found = []
        for name, tokens, finished in gained:
            row = int(name)
            found.append((row, tokens))
            self._meter.read(self._unread.pop(row, 0))
            if finished:
                self._active.discard(row)
        self._meter.wrote(sum(len(tokens) for _, tokens in found))
        return found

    def leave(self, row: int) -> None:
        """As `Rows.leave`."""
        self._unread.pop(row, None)
        if row in self._active:
            self._active.discard(row)
            with self._engine.here() as llm:
                internals.drop(llm, str(row))


def rows_at_once(config: Config, *, on_cpu: bool, members: int = 1) -> int:
    """How many sequences vLLM decodes at once at most."""
    least, most = (CPU_ROWS, CPU_ROWS) if on_cpu else GPU_ROWS
    return config.batch_size or min(max(config.rows_of_member * members, least), most)


def slots_for(config: Config, *, on_cpu: bool) -> int:
    """How many members vLLM is set up to decode at once, each in a slot."""
    engines = config.workers or 1
    rows = config.batch_size or (CPU_ROWS if on_cpu else GPU_ROWS[1])
    fitting = max(1, min(rows // config.rows_of_member, MOST_SLOTS))
    members = config.members / config.prompt_groups  # with the same prompts
    return config.vllm_max_loras or min(fitting, math.ceil(members / engines))


def live_dtype(checkpoint: Checkpoint, config: Config, model: Any) -> str:
    """The type of the live weights: float32, bfloat16 or float16."""
    picked = pick_dtype(config.dtype, chosen_device(config.device))
    if isinstance(picked, torch.dtype):
        return type_name(picked)
    if model.dtype is not None:
        return type_name(model.dtype) if isinstance(model.dtype, torch.dtype) else str(model.dtype)
    stored = {safetensors: name for name, safetensors in DTYPES.items()}
    return next((stored[t.dtype] for t in checkpoint.stored.values() if t.dtype in stored), "float32")
