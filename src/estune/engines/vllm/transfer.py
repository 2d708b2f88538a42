"""The backend of vLLM's weight transfer whose weights are seeds. Imported inside vLLM's workers alone.

`/update_weights` of vLLM's development mode takes them as well, once the weights are opened: {"seed": 1, "sigma": 0.01}
makes the live weights a member's, {"pairs": [[1, 0.5]]} adds to the base and {} restores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from estune.engines.vllm.worker import ModelShard
from estune.errors import EstuneError
from estune.es.strategy import Member, Update


@dataclass
class Nothing(WeightTransferInitInfo):  # type: ignore[misc]
    """What a transfer needs to begin: there is no connection to make."""


@dataclass
class Seeds(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A member to perturb by, or pairs to add to the base."""

    seed: int | None = None
    sigma: float = 0.0
    pairs: Sequence[tuple[int, float]] = field(default_factory=tuple)
    decay: float = 0.0


class SeedTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Holds the worker's `ModelShard`; vLLM makes one when it has loaded the model."""

    init_info_cls = Nothing
    update_info_cls = Seeds
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        runner = SimpleNamespace(get_model=lambda: model)
        rank = vllm_config.parallel_config.rank
        self.shard = ModelShard(SimpleNamespace(rank=rank, vllm_config=vllm_config, model_runner=runner))

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: weights change in place."""

    def receive_weights(self, update_info: Seeds) -> None:
        """Perturb, add or restore, as the seeds say."""
        if self.shard.weights is None:
            raise RuntimeError("estune: nobody has said which weights are trained; connect by estune first")
        seeds = update_info
        answer: Any = None
        if seeds.pairs or seeds.decay:
            members = tuple(Member(int(seed)) for seed, _ in seeds.pairs)
            answer = self.shard.call("apply", Update(0, members, tuple(c for _, c in seeds.pairs), seeds.decay))
        if seeds.seed is not None:
            answer = self.shard.call("perturb", Member(seeds.seed), seeds.sigma)
        else:
            answer = answer or self.shard.call("restore")
        if isinstance(answer, EstuneError):
            raise RuntimeError(str(answer))

    def finish_weight_update(self) -> None:
        """Nothing to do."""

    def shutdown(self) -> None:
        """Nothing to release."""
