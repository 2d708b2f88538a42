"""Weights that vLLM holds, perturbed in place by its workers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from estune.config import Config
from estune.engines.loading import language_tensors
from estune.engines.vllm.calls import Digest, VllmCalls
from estune.engines.vllm.engine import VllmEngine
from estune.engines.vllm.parameter_map import count_once, tied_names
from estune.engines.vllm.shard import Opening
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint
from estune.noise.reference import low_rank_by_id, normal_by_id
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import fits, refuse_unfitting
from estune.weights.policies import POLICIES, Rule
from estune.weights.scales import scales_of
from estune.weights.tensors import DTYPES, RUN_LENGTH, convert, narrow, widen
from estune.weights.trained import Array, Drift, Runs, as_drift, as_norms

PROBE = Member(0xC0FFEE), 0.01  # what live weights are compared under


STRONG = 0.05  # sigma under which completions have to be others


class VllmWeights:
    """The trained parameters of a vLLM engine in all of its processes, as `TrainedWeights`.

    Args:
        engine: whose weights they are.
        checkpoint: what the engine was started with.
        config: the settings.
        base_on_host: keep the base of weights on a GPU in pinned host memory.

    Raises:
        EstuneError: vLLM's layout of the model cannot be trained, or its completions do not follow the weights.
    """

    def __init__(self, engine: VllmCalls, checkpoint: Checkpoint, config: Config, *, base_on_host: bool) -> None:
        self._engine = engine
        self._shapes = {name: t.shape for name, t in checkpoint.tensors.items()}
        held, counted = self._draw(checkpoint)
        spoken = language_tensors(checkpoint, trust_remote_code=config.trust_remote_code)
        pattern = config.train_parameters
        self.tensors = {name: of for name, of in held.items() if fits(name, pattern, spoken=name in spoken)}
        """The trained tensors by checkpoint name, each with the names tied to it."""
        refuse_unfitting(pattern, self._shapes)
        if not self.tensors:
            raise EstuneError(f"train_parameters: {pattern} leaves no parameter to train")
        chosen = {name: tuple(aliases) for name, aliases in self.tensors.items()}
        dtype = POLICIES[config.weights].dtype(self._live_dtype)
        scales = scales_of(config.sigma_scale, checkpoint, list(self.tensors))
        self.rule = Rule(config.weights, config.rounding, config.noise_mode, dtype, scales)
        """How the base is kept and changed."""
        self._opening = Opening(
            checkpoint.path,
            self.rule,
            config.threads or 1,
            base_on_host,
            chosen,
            counted,
        )
        engine.call("open", self._opening)
        self._check(checkpoint)

    def _draw(self, checkpoint: Checkpoint) -> tuple[dict[str, list[str]], dict[int, list[bool]]]:
        """Find where a checkpoint's tensors lie.

        Returns:
            The tensors that are held by name, each with the names tied to it; and, by rank, for each place there,
            whether it is counted.
        """
        maps = dict(self._engine.call("draw", checkpoint.path))
        ranks = sorted(maps)
        counted = dict(zip(ranks, count_once([maps[rank] for rank in ranks], self._shapes), strict=True))
        places = [place for rank in ranks for place in maps[rank]]
        ties = tied_names(places, self._shapes, self._engine.config.get_text_config(decoder=True))
        return {name: ties.get(name, []) for name in dict.fromkeys(place.name for place in places)}, counted

    @property
    def _live_dtype(self) -> str:
        """Type of the tensors that are perturbed."""
        return self._engine.dtype

    @property
    def elements(self) -> int:
        """Elements of all trained tensors."""
        return sum(math.prod(self._shapes[name]) for name in self.tensors)

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the live weights base + sign * sigma * noise(seed). Needs no restore between members."""
        self._engine.call("perturb", member, sigma)
        self._engine.forget()

    def restore(self) -> None:
        """Make the live weights the base again: exactly, unless the policy drifts."""
        self._engine.call("restore")
        self._engine.forget()

    def apply(self, update: Update) -> None:
        """Add an update to the base. The live weights follow at the next `perturb` or `restore`."""
        self._engine.call("apply", update)
        self._forget_base()

    def anchor(self, checkpoint: Checkpoint, update: Update) -> None:
        """Bring the base as far toward a checkpoint's tensors as an update says."""
        self._engine.call("anchor", checkpoint.path, update)
        self._forget_base()

    def fingerprint(self) -> str:
        """Hash of the base weights, 16 hexadecimal digits: that of `Weights` over the whole tensors."""
        return as_fingerprint(self.share_sum())

    def share_sum(self) -> int:
        """Sum of the hashes of the base's elements, each counted once."""
        return sum(self._engine.call("share_sum"))

    def drift(self) -> Drift | None:
        """How far the weights have drifted since the last update; None where the policy does not drift."""
        return as_drift(self._engine.call("drift_sums")) if self.rule.how.drifts else None

    def load(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the base, such as one that an earlier part of the run saved."""
        self._engine.call("load", checkpoint.path)
        self._forget_base()

    def keep(self, name: str, most: int) -> None:
        """As `Weights.keep`."""
        self._engine.call("keep", name, most)

    def bring(self, name: str) -> bool:
        """As `Weights.bring`."""
        found = all(self._engine.call("bring", name))
        self._forget_base()
        return found

    def show(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint's tensors the live weights until the next `perturb` or `restore`."""
        self._engine.call("show", checkpoint.path)
        self._engine.forget()

    def change(self, checkpoint: Checkpoint) -> tuple[float, float]:
        """Norm of the base's difference from a checkpoint, and of the checkpoint's tensors themselves."""
        return as_norms(self._engine.call("change_sums", checkpoint.path))

    def runs(self) -> Runs:
        """The base by checkpoint name, tied names included, as `Checkpoint.write` takes it."""

        def reader(name: str) -> Callable[[], Iterator[Array]]:
            return lambda: self._gather(name)

        return {alias: reader(name) for name, aliases in self.tensors.items() for alias in (name, *aliases)}

    def _forget_base(self) -> None:
        """Forget what the base has computed, where the live weights are it and have changed with it."""
        if not self.rule.how.keeps_base:
            self._engine.forget()

    def _gather(self, name: str) -> Iterator[Array]:
        """A tensor's base, some `RUN_LENGTH` elements at a time, put together from what each process holds."""
        shape = self._shapes[name]
        columns = shape[-1] if len(shape) > 1 else 1
        rows = math.prod(shape) // max(columns, 1)
        block = max(1, RUN_LENGTH // max(columns, 1))
        for first in range(0, rows, block):
            count = min(block, rows - first)
            parts = list(itertools.chain.from_iterable(self._engine.call("rows", name, first, count)))
            whole = np.empty((count, columns), parts[0][2].dtype)
            for row, column, values in parts:
                whole[row - first : row - first + len(values), column : column + values.shape[1]] = values
            yield whole.reshape(-1)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Check that the live weights are what they should be, and that it is they that generate."""
        engine = self._engine
        before = self._engine.digest()
        self._probe(PROBE[1])
        samples = list(itertools.chain.from_iterable(engine.call("samples")))
        self._check_samples(checkpoint, samples)
        self._probe(STRONG)
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
        if not answers or not same(engine.digest(), before):
            found = "do not come back with the weights" if answers else "do not answer to changes of the weights"
            raise EstuneError(f"engine=vllm cannot train this model: completions {found}; use engine=transformers")

    def _probe(self, sigma: float) -> None:
        """Perturb the live weights, to be looked at; `_undo` brings them back."""
        self.perturb(PROBE[0], sigma)

    @property
    def _probed_dtype(self) -> str:
        """Type of what `_probe` perturbs around."""
        return self.rule.dtype

    def _check_samples(self, checkpoint: Checkpoint, samples: Sequence[Any]) -> None:
        member, sigma = PROBE
        for sample in samples:
            count = len(sample.values)
            live = DTYPES[sample.dtype.removeprefix("torch.")]
            stored = checkpoint.tensors[sample.name].stored(sample.start, count)
            base = widen(convert(stored, DTYPES[self._probed_dtype]))
            columns = self.rule.noise_columns(checkpoint.tensors[sample.name].columns)
            where = sample.start, count
            key = self.rule.noise_key(sample.name)
            if columns:
                noise = low_rank_by_id(member.seed, key, columns, self.rule.rank, *where)
            else:
                noise = normal_by_id(member.seed, key, *where)
            factor = np.float32(sigma * self.rule.scales.get(sample.name, 1.0))
            if not np.array_equal(narrow(base + factor * noise, live), sample.values):
                raise EstuneError(
                    f"engine=vllm cannot train this model: {sample.name}, perturbed, is not what it should be from "
                    f"element {sample.start} on; use engine=transformers"
                )

    def _undo(self, checkpoint: Checkpoint) -> None:
        self.restore()
        if not self.rule.how.keeps_base:
            self.load(checkpoint)  # what rounding has left of the checks


class SlotWeights(VllmWeights):
    """Weights of which members can be in slots of vLLM's LoRA layers, so that many are generated with at once.

    Arguments as of `VllmWeights`, the engine being in this process.
    """

    _engine: VllmEngine

    over_base: bool
    """Whether members in slots are added to the live weights; otherwise the first slot is these."""

    def take(self, members: Sequence[Member], sigma: float) -> None:
        """Make the first slots these members', as many as the engine has at most."""
        self._engine.call("take", members, sigma)
        self._engine.forget()


def same(a: Digest, b: Digest) -> bool:
    """Whether two digests are of the same weights, but for what a device rounds differently from call to call."""
    return all(
        x.keys() == y.keys() and all(math.isclose(x[token], y[token], abs_tol=1e-2) for token in x)
        for x, y in zip(a, b, strict=True)
    )
