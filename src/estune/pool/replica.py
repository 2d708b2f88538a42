"""An engine with its weights: what evaluates a member, in this process or another."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from estune.completion import Completion, Engine, Sampling
from estune.config import Config
from estune.engines.cpu.members import Drawn
from estune.engines.integers import put_integers
from estune.engines.memory import give_back_memory, memory_for, total_memory
from estune.engines.score import divergence
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.grading.rollout import is_played
from estune.journal.identity import model_files
from estune.pool.base import Description, Evaluated
from estune.pool.generator import Generator, open_transformers, set_up_process, sharers
from estune.pool.together import LowRank, Slots, Together
from estune.pool.turns import gpus_of, in_turn
from estune.weights.adapted import open_checkpoint
from estune.weights.base import Share, keeps_base_on_host
from estune.weights.checkpoint import Checkpoint
from estune.weights.device import device_kind, synchronize, training_device
from estune.weights.grid import Grid
from estune.weights.integers import IntegerWeights, in_window, quantised, refuse_pattern, say_what_is_anew
from estune.weights.moments import has_moments
from estune.weights.parameters import Parameter, trained_parameters
from estune.weights.places import check_places
from estune.weights.policies import POLICIES
from estune.weights.quantized import quantized_by, refuse_quantized
from estune.weights.rebuild import Steps, is_anchored
from estune.weights.scales import scales_of
from estune.weights.storage import flat, type_name
from estune.weights.trained import Drift, TrainedWeights
from estune.weights.weights import Weights


class Trained(Generator):
    """A generator whose weights are perturbed, around a base of its own or a shared one.

    Args:
        engine: that generates.
        weights: the engine's.
        checkpoint: that they come from.
        config: the settings.
        kind: of the device that it computes on.
    """

    def __init__(
        self, engine: Engine, weights: TrainedWeights, checkpoint: Checkpoint, config: Config, kind: str
    ) -> None:
        super().__init__(engine, config)
        self.weights = weights
        self.checkpoint = checkpoint
        self._kind = kind
        self._together: Together | None = None  # generates with many members at once
        self._taken = False  # it has members
        self._members: tuple[Sequence[Member], float] = ((), 0.0)  # that were taken last, and their sigma
        self._restored = False  # the live weights are the base

    def evaluate(
        self, member: Member, sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> Evaluated:
        """Generate with a member's weights."""
        (found,) = self.evaluate_each([member], sigma, prompt_ids, sampling)
        return found

    def evaluate_each(
        self, members: Sequence[Member], sigma: float, prompt_ids: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Evaluated]:
        """Generate with the weights of each of these members, of which there are as many as `at_once` says, at most."""
        start = time.perf_counter()
        self.take(members, sigma, played=is_played(prompt_ids))
        taken = time.perf_counter()
        found = self.complete_each(prompt_ids, sampling)
        times = (taken - start) / len(members), (time.perf_counter() - taken) / len(members)
        return [Evaluated(completions, *times) for completions in found]

    def at_once(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, share: int | None = None) -> int:
        """How many members can be taken at once, to complete these prompts.

        Where it does not matter to their bits who is beside whom, at most `share`, an engine's part of all members;
        elsewhere groups are the same with any number of engines.
        """
        if self._together is None or is_played(prompt_ids):
            return 1
        most = self._together.most(prompt_ids, sampling)
        return min(most, share) if share is not None and self._together.apart else most

    def take(self, members: Sequence[Member], sigma: float, *, played: bool = False) -> None:
        """Make ready to generate with these members' weights.

        Args:
            members: as many as `at_once` says, at most. One that is not decoded together with others becomes the live
                weights.
            sigma: of the perturbations.
            played: prompts will open rollouts.
        """
        self._taken = self._together is not None and not played
        self._members = members, sigma
        if self._together is None or played:
            (member,) = members
            self.perturb(member, sigma)
            return
        if not self._together.over_base:
            self._restored = False
        elif not self._restored:
            self._restore()
        self._together.take(members, sigma)

    def complete_each(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Generate with the weights of each member that was taken, `[members][prompts]`."""
        if self._together is None or not self._taken:
            found = [self.complete(prompt_ids, sampling)]
        else:
            found = self._together.complete(prompt_ids, sampling)
        return self._with_divergence(prompt_ids, found) if self._config.constrains_kl else found

    def _with_divergence(
        self, prompt_ids: Sequence[Sequence[int]], each: list[list[Completion]]
    ) -> list[list[Completion]]:
        """What members completed, with their divergence from the base model, whose weights are then the live ones."""
        members, sigma = self._members
        ids = [[completion.token_ids for completion in completions] for completions in each]
        now = []
        for member, of_member in zip(members, ids, strict=True):
            if self._taken:  # otherwise the live weights are its own
                self.perturb(member, sigma)
            now.append(self.engine.score(prompt_ids, of_member))
        self.weights.show(self.checkpoint)
        self._restored = False
        base = [self.engine.score(prompt_ids, of_member) for of_member in ids]
        return [
            [replace(c, kl=divergence([ours], [theirs])) for c, ours, theirs in zip(*of_member, strict=True)]
            for of_member in zip(each, now, base, strict=True)
        ]

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the live weights a member's."""
        self._restored = False
        self.weights.perturb(member, sigma)

    def _restore(self) -> None:
        """Make the live weights the base."""
        self.weights.restore()
        self._restored = True

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Generate with the base weights."""
        self._restore()
        return super().generate(prompt_ids, sampling)

    def apply(self, update: Update) -> int:
        """Add an update to the base, or to its share of it; return the sum of the hashes of what was updated."""
        self._add(update)
        return self.weights.share_sum()

    def _add(self, update: Update) -> None:
        self._restored = False
        if is_anchored(update):
            self.weights.anchor(self.checkpoint, update)
        self.weights.apply(update)

    def load(self, checkpoint: Path) -> None:
        """Make a checkpoint's tensors the base, if this replica is the one that fills it."""
        self._restored = False
        self.weights.load(Checkpoint(checkpoint))

    def rebuild(self, updates: Sequence[Update], checkpoint: tuple[int, Path] | None = None) -> str:
        """Make the base what it is after `updates`, and return its fingerprint.

        Args:
            updates: all of the run so far.
            checkpoint: a number of updates, and the directory of the weights after them. Where this machine has no such
                directory, or it lacks what follows from earlier updates (moments, or what integer weights carry on),
                all are made again from the base model.
        """
        done, path = checkpoint if checkpoint is not None and checkpoint[1].is_dir() else (0, self.checkpoint.path)
        if has_moments(updates[:done]) or in_window(self.weights.rule, done):
            done, path = 0, self.checkpoint.path
        self.load(path)
        self.advance(updates[done:])
        return self.weights.fingerprint()

    def advance(self, updates: Sequence[Update]) -> None:
        """Make these further updates."""
        Steps(self.weights.rule, updates).retrace(self.weights.perturb, lambda number: self._add(updates[number]))

    def save(self, path: Path, dtype: str) -> None:
        """Write the base weights as a checkpoint of this type."""
        self.checkpoint.write(path, self.weights.runs(), dtype, grid=self.weights.rule.grid)

    def describe(self) -> Description:
        """What it trains. This reads the base checkpoint, to hash it."""
        return Description(
            engine="transformers" if isinstance(self.engine, TransformersEngine) else "vllm",
            base_hash=self.checkpoint.content_hash(),
            files=model_files(self.checkpoint.path),
            rule=self.weights.rule,
            live_dtype=self.engine.dtype,
            tensors={name: list(aliases) for name, aliases in self.weights.tensors.items()},
            elements=self.weights.elements,
            fingerprint=self.weights.fingerprint(),
            device=self._kind,
        )

    def compare(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> dict[str, float]:
        """How far the base weights have come from the base model.

        Returns:
            `weights/change`: norm of the change; `weights/relative_change`: the same over the norm of the base model's
            weights; `kl`: divergence from the base model in nats a token, over the completions. For `kl` the base
            model's weights replace the live ones for a while. It is missing if no base is kept to bring these back, or
            if there are no completions. Values that are not finite, as of weights that are far gone, are left out.
        """
        self.weights.restore()  # where no base is kept, the live weights are it
        difference, norm = self.weights.change(self.checkpoint)
        found = {"weights/change": difference, "weights/relative_change": difference / norm if norm else 0.0}
        if self.weights.rule.how.keeps_base and completion_ids:
            now = self.engine.score(prompt_ids, completion_ids)
            self.weights.show(self.checkpoint)
            base = self.engine.score(prompt_ids, completion_ids)
            self.weights.restore()
            found["kl"] = divergence(now, base)
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def drift(self) -> Drift | None:
        """What restoring left behind since the last update; None where it leaves nothing."""
        return self.weights.drift()


class Replica(Trained):
    """A `Trained` with an engine that it starts. Replicas with the same base give the same completions.

    Args:
        config: the settings; `config.threads` is the number of CPU threads to compute with.
        share: of a base that it shares with other processes. One of them must have filled it before any perturbs.

    Raises:
        EstuneError: for a model that cannot be had or trained.
    """

    def __init__(self, config: Config, share: Share | None = None) -> None:
        set_up_process(config)
        checkpoint = open_checkpoint(config.model, config.adapter)
        refuse_quantized(checkpoint, POLICIES[config.weights].bits)
        self._device = training_device(config.device)
        self._vllm = config.engine == "vllm"
        if self._vllm and config.constrains_kl:
            raise EstuneError("constraint: kl is told by transformers' engine alone: set engine=transformers")
        engine: Engine
        weights: TrainedWeights
        together: Together | None = None
        if self._vllm:
            from estune.engines.vllm.open import open_vllm
            from estune.engines.vllm.weights import SlotWeights

            with in_turn(gpus_of(config)):
                engine, weights = open_vllm(checkpoint, config)
            if isinstance(weights, SlotWeights):
                together = Slots(engine, weights)
        else:
            engine = open_transformers(checkpoint, config, self._device)
            weights = open_weights(engine, checkpoint, config, share)
            if weights.rule.grid is not None:
                give_back_memory()  # that of the weights as they were loaded
        super().__init__(engine, weights, checkpoint, config, device_kind(self._device))
        self._together = together
        if config.noise_rank and isinstance(engine, TransformersEngine) and isinstance(weights, Weights):
            # Drift is that of members one by one.
            drawer = None if weights.rule.how.drifts else engine.together(drawn(weights))
            self._together = None if drawer is None else LowRank(engine, drawer)
            if self._together is None:
                weights.refuse_low_rank()

    def perturb(self, member: Member, sigma: float) -> None:
        """Make the live weights a member's."""
        super().perturb(member, sigma)
        if not self._vllm:  # whose processes wait for their own devices; this one may have nothing on any
            synchronize(self._device)  # for the clock: a device is still at work


def drawn(weights: Weights) -> dict[int, Drawn]:
    """What members perturb, by the address of its memory."""
    return {
        p.tensor.data_ptr(): Drawn(
            weights.rule.noise_key(p.name),
            tuple(p.tensor.shape),
            weights.rule.scales.get(p.name, 1.0),
            weights.rule.rank,
        )
        for p in weights.parameters
    }


def open_weights(
    engine: TransformersEngine, checkpoint: Checkpoint, config: Config, share: Share | None = None
) -> TrainedWeights:
    """The weights of an engine, made ready to train.

    Args:
        engine: whose weights they are.
        checkpoint: that they come from.
        config: the settings.
        share: as for `Replica`.

    Raises:
        EstuneError: for weights that cannot be trained, or a lack of memory for the base.
    """
    parameters = trained_parameters(engine.model, checkpoint.tensors, config.train_parameters)
    check_places(parameters, checkpoint)
    grid = POLICIES[config.weights].grid(config.weights_group_size, config.carry_steps)
    if grid is not None:
        return open_integers(engine, checkpoint, config, parameters, grid)
    on_host = wants_base_on_host(engine, config, parameters)
    remedy = less_base(engine.device, on_host=on_host)
    with memory_for("the base that is kept beside the live weights", remedy):
        weights = Weights(
            parameters,
            policy=config.weights,
            rounding=config.rounding,
            noise=config.noise_mode,
            scales=scales_of(config.sigma_scale, checkpoint, [p.name for p in parameters]),
            threads=config.threads or 1,
            base_on_host=on_host,
            share=share,
        )
    if weights.rule.how.base_dtype is not None:
        weights.load(checkpoint)  # the engine may hold it rounded
    return weights


def open_integers(
    engine: TransformersEngine, checkpoint: Checkpoint, config: Config, parameters: Sequence[Parameter], grid: Grid
) -> IntegerWeights:
    """The matrices of an engine's model, made integers; arguments as of `open_weights`.

    Raises:
        EstuneError: the model is not on a CPU, or has no such matrices.
    """
    if engine.device.type != "cpu":
        raise EstuneError(
            f"weights={config.weights} has kernels for the CPU alone, not for {engine.device.type}: set device=cpu"
        )
    refuse_pattern(config.train_parameters, checkpoint.tensors, grid.bits)
    if quantized_by(checkpoint.path) is not None:
        parameters = quantised(parameters, checkpoint, grid)
    matrices = put_integers(engine.model, parameters, grid)
    engine.decoder = engine.make_decoder(config.cuda_graphs)  # which moves weights: only then they lie where they stay
    weights = IntegerWeights(
        matrices,
        checkpoint,
        policy=config.weights,
        grid=grid,
        rounding=config.rounding,
        scales=scales_of(config.sigma_scale, checkpoint, [matrix.name for matrix in matrices]),
        threads=config.threads or 1,
        keep_error=config.carry == "keep",
    )
    say_what_is_anew(weights, checkpoint, config.model)
    return weights


def wants_base_on_host(engine: TransformersEngine, config: Config, parameters: Sequence[Parameter]) -> bool:
    """Whether the base of these parameters is kept in host memory, by the settings or for lack of room on a GPU."""
    policy = POLICIES[config.weights]
    if engine.device.type != "cuda" or not policy.keeps_base:
        return False
    tensors = [flat(p.tensor) for p in parameters]  # refuses types that there are no kernels for
    return keeps_base_on_host(
        config.base_device,
        base=sum(policy.base_bytes(len(t), type_name(t.dtype)) for t in tensors),
        live=sum(p.nbytes for p in engine.model.parameters()),
        memory=total_memory(engine.device) // sharers(config, engine.device),
    )


def less_base(device: torch.device, *, on_host: bool) -> str:
    """Advice if a base does not fit: another place for it, if there is one, or a smaller base."""
    another = "" if on_host or device.type != "cuda" else "base_device=host, "
    return f"set {another}weights=copy or weights=exact_inplace, or fewer replicas"
