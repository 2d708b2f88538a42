"""An adapter that vLLM holds in its slots for LoRA, one of them a member's, so that many are generated with at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from estune.engines.vllm.lora import FIRST, refusing
from estune.engines.vllm.weights import PROBE, STRONG, SlotWeights, same
from estune.errors import EstuneError
from estune.es.strategy import Update
from estune.weights.checkpoint import Checkpoint


class AdapterWeights(SlotWeights):
    """The trained parameters of an adapter, as `TrainedWeights`: those of the transformers engine to the bit.

    The live weights are those of the first slot. Arguments as of `VllmWeights`, the engine being in this process.

    Raises:
        EstuneError: vLLM has no place for the adapter, or its completions do not follow it.
    """

    over_base = False

    @property
    def _live_dtype(self) -> str:
        return "float32"  # as PEFT holds an adapter, whatever the model's type

    def _draw(self, checkpoint: Checkpoint) -> tuple[dict[str, list[str]], dict[int, list[bool]]]:
        with refusing(checkpoint.path):
            for slot in range(self._engine.slots):
                self._engine.fill(checkpoint, slot)
            self._engine.call("draw", checkpoint.path)
        return {name: [] for name in checkpoint.tensors}, {}

    def _check(self, checkpoint: Checkpoint) -> None:
        """Check that slots hold what vLLM makes of a file with the same values, and that it is they that generate."""
        before = self._engine.digest()
        self.perturb(PROBE[0], STRONG)
        answers = self._engine.digest() != before
        self.restore()
        if not answers or not same(self._engine.digest(), before):
            found = "do not come back with the adapter" if answers else "do not answer to changes of the adapter"
            raise EstuneError(f"engine=vllm cannot train this adapter: completions {found}; use engine=transformers")
        self.apply(Update(0, (PROBE[0],), (STRONG,)))  # as B may be zero
        self.restore()
        ours = self._engine.call("digests")
        with tempfile.TemporaryDirectory(prefix="estune-") as folder:
            probe = Path(folder) / "adapter"
            checkpoint.write(probe, self.runs(), self.rule.dtype)
            with refusing(checkpoint.path):
                self._engine.fill(Checkpoint(probe), FIRST)
        if self._engine.call("digests") != ours:
            raise EstuneError(
                "engine=vllm cannot train this adapter: vLLM makes something else of the same values in a file; use "
                "engine=transformers"
            )
        self.load(checkpoint)
        self.restore()
