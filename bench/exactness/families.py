"""Which families of models can be trained, of all that transformers knows.

    python -m bench.exactness.families [FAMILY ...]

Of each family a random model of a few hundred thousand parameters is made from transformers' own defaults, and trained
for two steps. That counts where the run replays from files to the same bytes, the checkpoint has the base's very names
and shapes, every tensor has moved, and transformers loads it as the weights that were trained (`tests/families.py`).
Of vision-language models the weights are updated twice and compared in the same ways, but nothing is generated, for
pictures need a family's own processor (`tests/engines/test_vision.py` shows some to seven families). Where a family is
not tried, that is because its defaults cannot be made small, or it does not run, here. Results go to
bench/results/families.json, and from there into docs/models.md.
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
    deadline,
    save_family,
    save_random,
    tiny_config,
    tiny_vision_config,
    train_and_compare,
    update_and_compare,
)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from estune.errors import EstuneError, first_line
from estune.weights.checkpoint import Checkpoint
from estune.weights.sizes import EXPERTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- made by python -m bench.exactness.families -->\n", "<!-- end -->\n"
LARGEST = 20_000_000  # parameters of a model that still counts as small
SECONDS = 120
TRAINED = "trained"


def tried(family: str) -> dict[str, Any]:
    """What comes of training a family of language models."""
    found = elements_of(AutoModelForCausalLM, tiny_config, family)
    if isinstance(found, str):
        return {"not tried": found}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = save_family(Path(folder) / "model", family)
            runs = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
            ids = torch.randint(10, 200, (1, 6), generator=torch.Generator().manual_seed(0))
            runs.generate(ids, max_new_tokens=3, do_sample=False)
        except Exception as error:  # whatever a family's defaults lead to
            return {"not tried": first_line(error)}
        text = runs.config.get_text_config(decoder=True)
        experts = max((getattr(text, name, None) or 0 for name in (*EXPERTS, "moe_num_experts")), default=0)
        kind = {"experts": experts, "tensors": len(Checkpoint(model).tensors)}
        return came_of(lambda: train_and_compare(Path(folder), model), found) | kind


def seen(family: str) -> dict[str, Any]:
    """What comes of updating the weights of a family of vision-language models: it is shown nothing."""
    found = elements_of(AutoModelForImageTextToText, tiny_vision_config, family)
    if isinstance(found, str):
        return {"not tried": found}
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = tiny_vision_config(family)
            model = save_random(Path(folder) / "model", AutoModelForImageTextToText, config)
        except Exception as error:  # as above
            return {"not tried": first_line(error)}
        if config.is_encoder_decoder:
            return {"not tried": "an encoder and a decoder"}
        return came_of(lambda: update_and_compare(Path(folder), model), found)


def elements_of(kind: Any, make: Callable[[str], Any], family: str) -> int | str:
    """The parameters of a family's model, or why it is not tried."""
    try:
        with torch.device("meta"):
            elements = sum(p.numel() for p in kind.from_config(make(family)).parameters())
    except Exception as error:  # as above
        return first_line(error)
    return elements if elements <= LARGEST else f"its defaults made small have {elements / 1e6:,.0f} million parameters"


def came_of(work: Callable[[], object], elements: int) -> dict[str, Any]:
    """What came of it."""
    try:
        with deadline(SECONDS):
            work()
    except (EstuneError, AssertionError, TimeoutError, RuntimeError) as error:
        return {"refused": re.sub(r"model /\S+: ", "", first_line(error))}
    return {TRAINED: elements}


def table(results: Mapping[str, Any]) -> str:
    """The results as a section of a page."""
    found = results["families"]
    experts = sorted(name for name, of in found.items() if TRAINED in of and of["experts"])
    dense = sorted(name for name, of in found.items() if TRAINED in of and not of["experts"])
    lines = [
        f"With transformers {results['transformers']}, by its names (`model_type`):",
        "",
        "| | families |",
        "|---|---|",
        f"| mixtures of experts, trained ({len(experts)}) | {_names(experts)} |",
        f"| others, trained ({len(dense)}) | {_names(dense)} |",
    ]
    refused = sorted((name, of["refused"]) for name, of in found.items() if "refused" in of)
    lines += [f"| refused | `{name}`: {why} |" for name, why in refused]
    eyes = results["vision"]
    exact = sorted(name for name, of in eyes.items() if TRAINED in of)
    lines.append(f"| vision-language models whose weights are found and updated ({len(exact)}) | {_names(exact)} |")
    refused = sorted((name, of["refused"]) for name, of in eyes.items() if "refused" in of)
    lines += [f"| refused | `{name}`: {why} |" for name, why in refused]
    left = sorted({name for each in (found, eyes) for name, of in each.items() if "not tried" in of} - {*exact})
    lines.append(
        f"| not tried: their defaults cannot be made small here, or do not run ({len(left)}) | {_names(left)} |"
    )
    return "\n".join(lines) + "\n"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


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
    results = {"families": {}, "vision": {}, **(json.loads(file.read_text()) if file.exists() else {})}
    results["transformers"] = version("transformers")
    for section, work, names in (
        ("families", tried, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("vision", seen, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        for family in sorted(set(names).intersection(arguments.families or names)):
            results[section][family] = found = work(family)
            print(section, family, found, flush=True)
            file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table(results) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
