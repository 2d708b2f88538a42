"""Members of low-rank noise in slots of vLLM's LoRA layers, over the model's own weights: many in one batch.

A member's matrix is W + a b^T, of a higher rank with as many such products, which is W with an adapter of that rank.
What is trained is W itself, under the layers.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from estune.config import Config
from estune.engines.loading import language_tensors
from estune.engines.vllm.engine import slots_for
from estune.engines.vllm.lora import module_of
from estune.engines.vllm.shard import SHAKEN
from estune.engines.vllm.slots import names_of
from estune.engines.vllm.weights import PROBE, STRONG, SlotWeights
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.noise.reference import COLUMNS_AT, NEXT_AT, normal_by_id
from estune.weights.adapted import adapted_shapes
from estune.weights.adapters import CONFIG, WEIGHTS, Adapter
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import fits
from estune.weights.policies import POLICIES

log = logging.getLogger(__name__)

Matrices = Mapping[str, tuple[int, ...]]
Scores = Sequence[Sequence[float]]
PROBED = 16  # tokens of the texts whose scores are compared
EXPERTS = "*.experts.*"


def outer_matrices(checkpoint: Checkpoint, config: Config, *, on_cpu: bool) -> Matrices:
    """The matrices that members in slots add to, with their shapes; none where members are decoded one by one.

    Where they are for what is trained, a warning says so, and what to train for slots.
    """
    slots = slots_for(config, on_cpu=on_cpu)
    if not config.noise_rank or slots < 2 or checkpoint.under is not None or POLICIES[config.weights].drifts:
        return {}
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    spoken = language_tensors(checkpoint, trust_remote_code=config.trust_remote_code)
    linear = {f"{module}.weight": shape for module, shape in adapted_shapes(shapes, Adapter()).items()}
    matrices = {name: shape for name, shape in linear.items() if name in spoken and not fits(name, EXPERTS)}
    trained = [name for name in shapes if fits(name, config.train_parameters, spoken=name in spoken)]
    other = next((name for name in trained if name not in matrices), None)
    if other is None:
        return {name: matrices[name] for name in trained}
    instead = _pattern(shapes, matrices)
    say_alone(
        f"train_parameters={config.train_parameters} trains {other} too, and vLLM's LoRA layers take matrices of the "
        f"layers alone, experts' left out: to decode many in one batch set train_parameters={instead}",
    )
    return {}


def say_alone(why: str) -> None:
    """Say that members are decoded one by one."""
    log.warning("members of low-rank noise are decoded one by one, as %s", why)


def _pattern(names: Matrices, matrices: Matrices) -> str:
    """What `train_parameters` is for these matrices of a checkpoint, and no other tensor: as short as may be."""
    ends = ",".join(dict.fromkeys(f"*.{module_of(name)}.weight" for name in matrices))
    begun = next(iter(matrices), "").partition(".layers.")[0]  # where what sees has matrices of these names, too
    return next(
        (
            p
            for p in ("*_proj.weight", ends, f"{begun}.*_proj.weight")
            if [name for name in names if fits(name, p)] == list(matrices)
        ),
        f"{ends},!{EXPERTS}",
    )


class LowRankWeights(SlotWeights):
    """The model's own weights, as `VllmWeights`, with members in slots: what these hold is added to the live weights.

    Raises:
        EstuneError: vLLM has no place for such members, or its completions do not follow them.
    """

    over_base = True

    @property
    def _probed_dtype(self) -> str:
        return self._live_dtype if self.rule.how.twin else self.rule.dtype

    def _probe(self, sigma: float) -> None:
        """As `VllmWeights._probe`, by policies too that take no such member back: none perturbs weights in a run."""
        self._engine.call("shake_all", PROBE[0], sigma)
        self._engine.forget()

    def _check(self, checkpoint: Checkpoint) -> None:
        """As `VllmWeights._check`; and that slots hold what vLLM makes of a file, and mean what perturbing means."""
        super()._check(checkpoint)
        engine = self._engine
        member = PROBE[0]
        with self._filled(Member(SHAKEN)) as adapter:
            engine.call("place_members", adapter)
        self.take([member] * engine.slots, STRONG)
        ours = engine.call("slot_digests")
        with self._filled(member):
            if engine.call("slot_digests") != ours:
                raise EstuneError("vLLM makes something else of the same values in a file")
        rows = engine.probes(PROBED)
        texts = [row[:1] for row in rows], [row[1:] for row in rows]
        base, in_slot = engine.score(*texts), engine.scores_in(engine.slots - 1, rows)
        self._probe(STRONG)
        perturbed = engine.score(*texts)
        self._undo(checkpoint)
        if not _distance(in_slot, perturbed) < _distance(base, perturbed) / 2:
            raise EstuneError("scores by members in slots are not those by perturbed weights")

    @contextmanager
    def _filled(self, member: Member) -> Iterator[Path]:
        """Have vLLM itself fill all slots with a member from a file; give the directory, which is there meanwhile."""
        with tempfile.TemporaryDirectory(prefix="estune-") as folder:
            path = Path(folder)
            self.write_member(path, member, STRONG)
            for slot in range(self._engine.slots):
                self._engine.fill(Checkpoint(path), slot)
            yield path

    def write_member(self, folder: Path, member: Member, sigma: float) -> None:
        """Write a member as an adapter in PEFT's format, by NumPy."""
        rank = self.rule.rank
        tensors = {}
        for name in self.tensors:
            rows, columns = self._shapes[name]
            noise = functools.partial(normal_by_id, member.seed, self.rule.noise_key(name))
            factor = np.float32(member.sign * sigma * (self.rule.scales.get(name, 1.0) / math.sqrt(rank)))
            begins = range(0, rank * NEXT_AT, NEXT_AT)
            first, second = names_of(name)
            tensors[first] = np.stack([noise(begin + COLUMNS_AT, columns) for begin in begins])
            tensors[second] = np.stack([factor * noise(begin, rows) for begin in begins], 1)
        save_file(tensors, folder / WEIGHTS)
        modules = sorted({module_of(name) for name in self.tensors})
        said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": modules}
        (folder / CONFIG).write_text(json.dumps(said))


def _distance(one: Scores, other: Scores) -> float:
    """Mean difference of log-probabilities (nats)."""
    return float(np.mean([abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]))
