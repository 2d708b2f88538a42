"""A trained model on the hub, with its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from estune.config import Config
from estune.errors import EstuneError
from estune.grading.convention import reward_name
from estune.tasks.base import Task
from estune.weights.checkpoint import EMBEDDED


def write_card(
    name: str,
    base: str,
    config: Config,
    task: Task,
    history: Sequence[Mapping[str, Any]],
    dataset_name: str | None = None,
) -> str:
    """A model card in Markdown, with the hub's metadata at its head.

    Args:
        name: the model's.
        base: what it was trained from; named in the metadata if that is on the hub.
        config, task: of the run.
        history: its logs, as `TrainerState.log_history`.
        dataset_name: the hub's name of what it was trained on.
    """
    head = ["library_name: transformers", "tags:", "- estune", "- evolution-strategies"]
    if base and base not in EMBEDDED and not Path(base).exists():
        head.append(f"base_model: {base}")
    if dataset_name:
        head.append(f"datasets: {dataset_name}")
    rate = config.sigma / 2 if config.learning_rate is None else config.learning_rate
    parts = [
        f"# {name.rsplit('/', 1)[-1]}",
        f"All weights of {base or 'a model'} fine-tuned with Evolution Strategies "
        "([arXiv 2509.24372](https://arxiv.org/abs/2509.24372)) by estune.",
        f"Rewards: {', '.join(reward_name(f) for f in task.reward_funcs)}. {history[-1]['step'] if history else 0} "
        f"steps of {config.population} members on {min(config.prompts_per_step, len(task.train))} prompts, sigma "
        f"{config.sigma:g}, learning rate {rate:g}, seed {config.seed}.",
    ]
    if last := next((logs for logs in reversed(history) if "eval_reward" in logs), None):
        parts.append(f"Held-out reward after step {last['step']}: {last['eval_reward']:.4f}.")
    return "---\n" + "\n".join(head) + "\n---\n\n" + "\n\n".join(parts) + "\n"


def upload(
    folder: Path, name: str, message: str, *, token: str | None, revision: str | None, private: bool | None
) -> str:
    """Upload a directory as a model, which is made if it is not there; return the commit's address.

    Raises:
        EstuneError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo = api.create_repo(name, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, revision=revision))
    except Exception as error:  # the hub's, the network's and the transport's own
        raise EstuneError(
            f"push_to_hub {name}: {' '.join(str(error).split())[:300]}; nothing is lost: save_model writes the same to "
            "a directory"
        ) from error
