"""A program that opens a model whose layers pack their weights: vLLM as it is without our way out."""

from __future__ import annotations

import sys
from pathlib import Path

from estune.config import Config
from estune.engines.vllm import internals
from estune.engines.vllm.open import open_vllm
from estune.errors import EstuneError
from estune.weights.checkpoint import Checkpoint


def main() -> None:
    internals.keep_weights_plain = lambda: None
    path = Path(sys.argv[1])
    try:
        open_vllm(Checkpoint(path), Config(model=str(path), engine="vllm", batch_size=8))
    except EstuneError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
