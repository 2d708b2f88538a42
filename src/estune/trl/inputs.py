"""The arguments of `ESTrainer`, in all the forms that TRL takes, made into what a run takes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from estune.engines.loading import has_vision
from estune.engines.tokenizer import load_tokenizer
from estune.errors import EstuneError
from estune.grading.convention import RewardFunction, Row
from estune.rewards.load import load_reward
from estune.rewards.model import RewardModel

EVAL_SET = "eval_set"
"""The column that tells several evaluation sets apart."""

_TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template*", "additional_chat_templates"),
)
_PROCESSOR_FILES = ("*processor_config.json",)


def as_rows(dataset: Any, what: str) -> list[Row]:
    """A data set's rows.

    Raises:
        EstuneError: it is missing, has no length, or is no set of rows.
    """
    if dataset is None:
        raise EstuneError(f"ESTrainer: no {what}; give a Dataset or a list of rows with a column prompt")
    if isinstance(dataset, Mapping):
        raise EstuneError(f"ESTrainer: {what} is a dict of sets ({', '.join(dataset)}); give one of them")
    if not hasattr(dataset, "__len__"):
        raise EstuneError(
            f"ESTrainer: {what} is a stream, and a run needs to know its rows: give "
            "Dataset.from_list(list(stream.take(10_000)))"
        )
    rows: list[Any] = list(dataset)
    bad = next((number for number, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if bad is not None:
        raise EstuneError(f"ESTrainer: {what} row {bad} is {type(rows[bad]).__name__}; give a dict with a prompt")
    return [dict(row) for row in rows]


def as_evaluation_rows(dataset: Any) -> list[Row]:
    """Rows of an evaluation set, if there is one; those of a dict of sets have their set's name as `EVAL_SET`."""
    if dataset is None:
        return []
    if not isinstance(dataset, Mapping):
        return as_rows(dataset, "eval_dataset")
    return [{**row, EVAL_SET: name} for name, part in dataset.items() for row in as_rows(part, f"eval_dataset {name}")]


def as_rewards(functions: Any, tokenizers: Any = None) -> list[RewardFunction]:
    """Reward functions from one or a list of functions, models and names.

    Raises:
        EstuneError: there is none, one cannot be had, or the tokenizers do not match.
    """
    given = list(functions) if isinstance(functions, list | tuple) else [functions]
    if given in ([], [None]):
        raise EstuneError("ESTrainer: no reward_funcs; give at least one function, reward model or name of one")
    each = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(given)
    if len(each) != len(given):
        raise EstuneError(
            f"ESTrainer: {len(each)} reward_processing_classes for {len(given)} reward_funcs; give one each, None for "
            "functions"
        )
    is_model = [isinstance(f, str) or not callable(f) or hasattr(f, "config") for f in given]
    return [
        RewardModel(function, tokenizer) if tokenizer is not None and model else load_reward(function)
        for function, tokenizer, model in zip(given, each, is_model, strict=True)
    ]


def accuracy_name(names: Sequence[str], metric: str) -> str:
    """The reward that is called accuracy: the one that `metric_for_best_model` names, else the first."""
    wanted = metric.removeprefix("eval_").removeprefix("rewards/").removesuffix("/mean")
    return wanted if wanted in names else names[0]


def has_other_tokenizer(model: Path, tokenizer: Any, *, trust_remote_code: bool) -> bool:
    """Whether a tokenizer encodes, renders or ends differently from a model's own; padding does not count.

    A processor is another one if its tokenizer is, or what it makes of pictures.
    """
    from transformers import AutoImageProcessor

    try:
        own = load_tokenizer(model, trust_remote_code=trust_remote_code)
    except EstuneError:
        return True  # none there
    if not _is_processor(tokenizer):
        return _substance(own) != _substance(tokenizer)
    eye = AutoImageProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    return (_substance(own), eye.to_dict()) != (_substance(tokenizer.tokenizer), tokenizer.image_processor.to_dict())


def tokenizer_of(model: Any, *, trust_remote_code: bool) -> Any:
    """The tokenizer that belongs to a model in memory, by the name it was loaded under; the processor, if it sees."""
    from transformers import AutoProcessor, AutoTokenizer

    name = model.config.name_or_path
    kind: Any = AutoProcessor if has_vision(model.config) else AutoTokenizer
    try:
        return kind.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub's, the network's and the loaders' own
        raise EstuneError(
            f"ESTrainer: the model in memory comes with no tokenizer (looked at {name!r}); give processing_class"
        ) from error


def link_model(model: Path, folder: Path, tokenizer: Any) -> None:
    """Make a directory with links to a model's files, all but those that a tokenizer, or a processor, will be in."""
    own = [*_TOKENIZER_FILES, *(_PROCESSOR_FILES if _is_processor(tokenizer) else ())]
    folder.mkdir()
    for file in model.iterdir():
        if not any(fnmatch(file.name, pattern) for pattern in own):
            os.symlink(file.resolve(), folder / file.name)


def _is_processor(tokenizer: Any) -> bool:
    """Whether it is a processor, of pictures and text."""
    return hasattr(tokenizer, "image_processor")


def _substance(tokenizer: Any) -> tuple[Any, ...]:
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if core is None else json.loads(core.to_str())
    kept = {key: value for key, value in rules.items() if core is None or key not in ("padding", "truncation")}
    return kept, tokenizer.chat_template, tokenizer.eos_token_id
