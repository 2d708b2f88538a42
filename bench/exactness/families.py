"""Which families of models can be trained, of all that transformers knows.

    python -m bench.exactness.families [FAMILY ...]

Of each family a random model of a few hundred thousand parameters is made from transformers' own defaults, and trained
for two steps on text. That counts where it completes prompts as transformers' `generate` does, the run replays from
files to the same bytes, the checkpoint has the base's very names and shapes, every tensor that is trained has moved,
and transformers loads it as the weights that were trained (`tests/families.py`). `tests/engines/test_vision.py` shows
pictures to seven families, for which each needs its own processor; where `generate` asks for one, the weights are
updated twice and compared in the same ways. Results go to bench/results/families.json, and from there into
docs/models.md.

Three families need timm, which imports torchvision. Beside PyTorch for CPUs recent builds of the package index do not
import, as their operators are for CUDA; 0.15.2 does, without operators, of which timm's models call none:

    pip install --no-deps --target FOLDER timm==1.0.31 torchvision==0.15.2
    PYTHONPATH=FOLDER python -m bench.exactness.families fast_vlm gemma3n perception_lm
"""

import argparse
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench.common import RESULTS
from tests.families import (
    complete_and_compare,
    completed,
    deadline,
    save_random,
    train_and_compare,
    update_and_compare,
)
from tests.family_configs import tiny_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from estune.engines.loading import has_vision, kind_of
from estune.errors import EstuneError, first_line
from estune.weights.checkpoint import Checkpoint
from estune.weights.sizes import EXPERTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- made by python -m bench.exactness.families -->\n", "<!-- end -->\n"
LARGEST = 20_000_000  # parameters of a model that still counts as small
SECONDS = 120
TRAINED = "trained"
UPDATED = "updated"
PAIR = "are an encoder with a decoder"
DRAFT = "draft for another model, whose keys and values they read, and write nothing alone"
LEFT_OUT = {
    "diffusion_gemma": "write the tokens of a block all at once",
    "evolla": "answer questions on proteins: transformers 5.23 lists it, and has no class for it",
    "gemma4_assistant": DRAFT,
    "gemma4_unified_assistant": DRAFT,
    **dict.fromkeys(("musicgen", "musicgen_melody"), "write several codes of music at a time, no text"),
    **dict.fromkeys(("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"), PAIR),
    "pi0": "move robots, and write no text",
    "shieldgemma2": "sort pictures into classes, and write no text",
}
"""Why families are none that could be trained here."""


def tried(family: str) -> dict[str, Any]:
    """What comes of training a family."""
    if family in LEFT_OUT:
        return {"left out": LEFT_OUT[family]}
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = tiny_config(family)
            kind = kind_of(config)
            with torch.device("meta"):
                elements = sum(p.numel() for p in kind.from_config(config, trust_remote_code=False).parameters())
            assert elements <= LARGEST, f"made small, it has {elements / 1e6:,.0f} million parameters"
            model = save_random(Path(folder) / "model", kind, config)
        except Exception as error:  # whatever a family's defaults lead to
            return why_not(error)
        text = config.get_text_config(decoder=True)
        experts = max((getattr(text, name, None) or 0 for name in (*EXPERTS, "moe_num_experts")), default=0)
        pictures = has_vision(config)
        about = {"experts": experts, "tensors": len(Checkpoint(model).tensors), "pictures": pictures}
        try:
            expected = completed(model)
        except Exception as error:  # as above
            if not pictures:
                return why_not(error)
            return came_of(lambda: update_and_compare(Path(folder), model), UPDATED, elements) | about

        def work() -> None:
            complete_and_compare(model, expected)
            train_and_compare(Path(folder), model)

        return came_of(work, TRAINED, elements) | about


def why_not(error: Exception) -> dict[str, str]:
    """Why a family's model cannot be made, or does not run."""
    lacking = re.search(r"requires the (\S+) library", str(error))
    return {"left out": f"need the package {lacking[1]}"} if lacking else {"not tried": first_line(error)}


def came_of(work: Callable[[], object], what: str, elements: int) -> dict[str, Any]:
    """What came of it."""
    try:
        with deadline(SECONDS):
            work()
    except (EstuneError, AssertionError, TimeoutError, RuntimeError) as error:
        return {"refused": re.sub(r"model /\S+: ", "", first_line(error))}
    return {what: elements}


def table(results: Mapping[str, Any]) -> str:
    """The results as a section of a page."""
    found = results["families"]
    trained = {name: of for name, of in found.items() if TRAINED in of}
    experts = [name for name, of in trained.items() if of["experts"] and not of["pictures"]]
    dense = [name for name, of in trained.items() if not of["experts"] and not of["pictures"]]
    shown = [name for name, of in trained.items() if of["pictures"]]
    updated = [name for name, of in found.items() if UPDATED in of]
    lines = [
        f"With transformers {results['transformers']}, by its names (`model_type`):",
        "",
        "| | families |",
        "|---|---|",
        f"| mixtures of experts, trained ({len(experts)}) | {_names(experts)} |",
        f"| others, trained ({len(dense)}) | {_names(dense)} |",
        f"| vision-language models, trained on text ({len(shown)}) | {_names(shown)} |",
        f"| vision-language models that `generate` asks for pictures: weights found and updated ({len(updated)}) "
        f"| {_names(updated)} |",
    ]
    reasons: dict[str, list[str]] = {}
    for name, of in found.items():
        if why := of.get("left out"):
            reasons.setdefault(why, []).append(name)
    lines += [f"| left out, as they {why} ({len(names)}) | {_names(names)} |" for why, names in sorted(reasons.items())]
    for word in ("refused", "not tried"):
        lines += [f"| {word} | `{name}`: {of[word]} |" for name, of in sorted(found.items()) if word in of]
    return "\n".join(lines) + "\n"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="which ones; all by default")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the result goes")
    arguments = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    file = arguments.results / "families.json"
    results = json.loads(file.read_text()) if file.exists() else {"families": {}}
    results["transformers"] = version("transformers")
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    for family in sorted(known.intersection(arguments.families or known)):
        results["families"][family] = found = tried(family)
        print(family, found, flush=True)
        file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table(results) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
