"""A trained model on the hub."""

from __future__ import annotations

from pathlib import Path

from estune.errors import EstuneError


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
