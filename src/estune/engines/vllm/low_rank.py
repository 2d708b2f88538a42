"""Members of low-rank noise in slots of vLLM's, over the model's own weights: many in one batch.

A member's matrix is W + a b^T, of a higher rank with as many such products, which is W with an adapter of that rank.
What is trained is W itself, under vLLM's LoRA layers. Embeddings, heads, norms and biases, which have none, are served
by `additions.py`.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from estune.config import Config
from estune.engines.loading import language_tensors
from estune.engines.vllm import lora
from estune.engines.vllm.calls import Digest
from estune.engines.vllm.engine import slots_for
from estune.engines.vllm.shard import SHAKEN
from estune.engines.vllm.slots import names_of
from estune.engines.vllm.weights import PROBE, STRONG, SlotWeights
from estune.errors import EstuneError
from estune.es.strategy import Member
from estune.noise.reference import COLUMNS_AT, NEXT_AT, normal_by_id
from estune.weights.adapters import CONFIG, WEIGHTS
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import fits, layer_of
from estune.weights.policies import POLICIES

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Scores = Sequence[Sequence[float]]
PROBED = 16  # tokens of the texts whose scores are compared


def slotted_tensors(checkpoint: Checkpoint, config: Config, *, on_cpu: bool) -> Shapes:
    """What members in slots add to: all that is trained, with its shapes; none where members are decoded one by one.

    Where they are for what is trained, a warning says so, and what to train for slots.
    """
    slots = slots_for(config, on_cpu=on_cpu)
    if not config.noise_rank or slots < 2 or checkpoint.under is not None or POLICIES[config.weights].drifts:
        return {}
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    spoken = language_tensors(checkpoint, trust_remote_code=config.trust_remote_code)
    matrices = {name: shape for name, shape in lora.matrices(shapes).items() if name in spoken}
    trained = {name: shapes[name] for name in shapes if fits(name, config.train_parameters, spoken=name in spoken)}
    why = unslotted(trained, matrices, speaks=len(spoken) == len(shapes))
    if why is None:
        return trained
    say_alone(
        f"train_parameters={config.train_parameters} trains {why}: to decode many in one batch set "
        f"train_parameters={_pattern(shapes, matrices)}"
    )
    return {}


def unslotted(trained: Shapes, matrices: Collection[str], *, speaks: bool) -> str | None:
    """What is trained that members cannot be in slots for; None if they can.

    Args:
        trained: the tensors.
        matrices: names of those that LoRA layers are for, trained or not.
        speaks: whether the model takes text alone: of what sees, vLLM looks up some of a batch's tokens.
    """
    other = next((n for n, shape in trained.items() if n not in matrices and not (speaks and _beside(n, shape))), None)
    if other is not None:
        return f"{other} too, for which vLLM has no slots"
    return None if any(name in matrices for name in trained) else "no matrix of a layer"


def _beside(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be one that `additions.py` serves: a vector, or a table or head, but not of experts."""
    table = len(shape) == 2 and not layer_of(name)[0].isdigit()
    return (table or len(shape) == 1) and not fits(name, lora.EXPERTS)


def say_alone(why: str) -> None:
    """Say that members are decoded one by one."""
    log.warning("members of low-rank noise are decoded one by one, as %s", why)


def _pattern(names: Shapes, matrices: Shapes) -> str:
    """What `train_parameters` is for these matrices of a checkpoint, and no other tensor: as short as may be."""
    ends = ",".join(dict.fromkeys(f"*.{lora.module_of(name)}.weight" for name in matrices))
    begun = next(iter(matrices), "").partition(".layers.")[0]  # where what sees has matrices of these names, too
    return next(
        (
            p
            for p in ("*_proj.weight", ends, f"{begun}.*_proj.weight")
            if [name for name in names if fits(name, p)] == list(matrices)
        ),
        f"{ends},!{lora.EXPERTS}",
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
        matrices = lora.matrices({name: self._shapes[name] for name in self.tensors})
        beside = [name for name in self.tensors if name not in matrices]
        tables = [name for name in beside if len(self._shapes[name]) > 1]
        vectors = [name for name in beside if name not in tables]
        for part, names in {"matrices": [*matrices], "tables": tables, "vectors": vectors}.items():
            if names:
                self._check_part(checkpoint, part, names)
        still = self._digest_of([])
        for name in beside:
            if self._digest_of([name]) == still:
                raise EstuneError(f"completions of members in slots do not answer to changes of {name}")

    def _check_part(self, checkpoint: Checkpoint, part: str, names: Sequence[str]) -> None:
        """Check scores by a member in a slot that adds to these tensors alone, with texts of the base beside it.

        They have to be those by perturbed weights, and the others those by the base.
        """
        engine = self._engine
        rows = engine.probes(PROBED)
        texts = [row[:1] for row in rows], [row[1:] for row in rows]
        base = engine.score(*texts)
        self._take_part(names)
        together = engine.scores_in([engine.slots - 1, None] * len(rows), [row for row in rows for _ in range(2)])
        in_slot, beside = together[::2], together[1::2]
        engine.call("shake_part", PROBE[0], STRONG, names)
        engine.forget()
        perturbed = engine.score(*texts)
        self._undo(checkpoint)
        apart = _distance(base, perturbed) / 2
        if not (_distance(in_slot, perturbed) < apart and _distance(beside, base) < apart):
            raise EstuneError(f"scores by members in slots are not those by perturbed {part}")

    def _digest_of(self, names: Sequence[str]) -> Digest:
        """Of completions by a member in a slot that adds to these tensors alone."""
        self._take_part(names)
        return self._engine.digest_in(self._engine.slots - 1)

    def _take_part(self, names: Sequence[str]) -> None:
        """Make the last slot a member's that adds to these tensors alone."""
        self._engine.call("take_part", self._engine.slots - 1, PROBE[0], STRONG, names)
        self._engine.forget()

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
        matrices = lora.matrices({name: self._shapes[name] for name in self.tensors})
        for name, (rows, columns) in matrices.items():
            noise = functools.partial(normal_by_id, member.seed, self.rule.noise_key(name))
            factor = np.float32(member.sign * sigma * (self.rule.scales.get(name, 1.0) / math.sqrt(rank)))
            begins = range(0, rank * NEXT_AT, NEXT_AT)
            first, second = names_of(name)
            tensors[first] = np.stack([noise(begin + COLUMNS_AT, columns) for begin in begins])
            tensors[second] = np.stack([factor * noise(begin, rows) for begin in begins], 1)
        save_file(tensors, folder / WEIGHTS)
        modules = sorted({lora.module_of(name) for name in matrices})
        said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": modules}
        (folder / CONFIG).write_text(json.dumps(said))


def _distance(one: Scores, other: Scores) -> float:
    """Mean difference of log-probabilities (nats)."""
    return float(np.mean([abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]))
