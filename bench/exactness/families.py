"""Which families of models can be trained, of all that transformers knows.

    python -m bench.exactness.families [FAMILY ...]

Of each family a random model of a few hundred thousand parameters is made from transformers' own defaults, and trained
for two steps. That counts where the run replays from files to the same bytes, the checkpoint has the base's very names
and shapes, every tensor has moved, and transformers loads it as the weights that were trained (`tests/families.py`).
Where a family is not tried, that is because its defaults cannot be made small, or it does not run, here. Results go to
bench/results/families.json, and from there into docs/models.md.
"""

import argparse
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench.common import RESULTS
from tests.families import deadline, save_family, tiny_config, train_and_compare
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from estune.errors import EstuneError, first_line
from estune.weights.checkpoint import Checkpoint
from estune.weights.sizes import EXPERTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- made by python -m bench.exactness.families -->\n", "<!-- end -->\n"
LARGEST = 20_000_000  # parameters of a model that still counts as small
SECONDS = 120
TRAINED = "trained"


def tried(family: str, make: Callable[[str], Any], save: Callable[[Path, str], Path]) -> dict[str, Any]:
    """What comes of training a family."""
    try:
        config = make(family)
        with torch.device("meta"):
            elements = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if elements > LARGEST:
            return {"not tried": f"its defaults made small have {elements / 1e6:,.0f} million parameters"}
        with tempfile.TemporaryDirectory() as folder:
            model = save(Path(folder) / "model", family)
            runs = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
            ids = torch.randint(10, 200, (1, 6), generator=torch.Generator().manual_seed(0))
            runs.generate(ids, max_new_tokens=3, do_sample=False)
    except Exception as error:  # whatever a family's defaults lead to
        return {"not tried": first_line(error)}
    text = config.get_text_config(decoder=True)
    experts = max((getattr(text, name, None) or 0 for name in (*EXPERTS, "moe_num_experts")), default=0)
    with tempfile.TemporaryDirectory() as folder:
        model = save(Path(folder) / "model", family)
        try:
            with deadline(SECONDS):
                train_and_compare(Path(folder), model)
        except (EstuneError, AssertionError, TimeoutError, RuntimeError) as error:
            return {"refused": first_line(error), "experts": experts}
        return {TRAINED: elements, "experts": experts, "tensors": len(Checkpoint(model).tensors)}


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
    left = sorted(name for name, of in found.items() if "not tried" in of)
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
    results = json.loads(file.read_text()) if file.exists() else {"families": {}}
    results["transformers"] = version("transformers")
    for family in arguments.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results["families"][family] = found = tried(family, tiny_config, save_family)
        print(family, found, flush=True)
        file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table(results) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
