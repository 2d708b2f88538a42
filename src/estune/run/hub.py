"""Runs on the hub: a checkpoint with its card and, small beside it, the journal that made it; or the journal alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet

from estune.errors import EstuneError, first_line
from estune.files import make_temporary, remove_temporary, replacing
from estune.journal import compact
from estune.journal.journal import Journal, is_run
from estune.journal.replay import replay
from estune.journal.signature import SIGNATURE, signature_of
from estune.run.card import Card
from estune.run.directory import RunDirectory
from estune.weights.rebuild import Told, unheard


def push(
    run: str | Path,
    name: str,
    step: int | None = None,
    *,
    journal_only: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    told: Told = unheard,
) -> str:
    """Upload a run: its checkpoint, a model card, and its journal in the compact form, with a signature if it has one.

    Args:
        run: its directory, or its journal in the compact form.
        name: of the model on the hub, which is made if it is not there.
        step: the weights after so many steps, rebuilt if they do not lie there; by default the best that there are.
        journal_only: no checkpoint: who has the base model rebuilds it.
        private, revision, token: as `huggingface_hub` takes them.
        told: hears what share of a rebuilt checkpoint is done, 0 to 1.

    Returns:
        The commit's address.

    Raises:
        EstuneError: there is no such run or step, or the hub cannot be reached, or refuses.
    """
    journal = Journal.read(Path(run))
    place = RunDirectory(Path(run))
    at = _best_step(journal, place) if step is None else len(Journal.read(Path(run), step).steps)
    temporary = make_temporary("hub")
    folder = temporary / "model"
    try:
        if journal_only:
            folder.mkdir()
        elif kept := _kept(journal, place, at):
            shutil.copytree(kept, folder)
        else:
            replay(journal.run, folder, at, told=told)
        (folder / compact.FILE).write_bytes(compact.pack(journal.texts()))
        if (signature := signature_of(journal)).is_file():
            shutil.copy(signature, folder / SIGNATURE)
        Card(journal, name, at, _problems(journal, place), journal_only=journal_only).write(folder)
        message = f"{'Journal' if journal_only else 'Weights and journal'} after step {at}"
        return upload(folder, name, message, token=token, revision=revision, private=private)
    finally:
        remove_temporary(temporary)


def pull(name: str, output: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download what `push` has uploaded.

    Args:
        name: of the model on the hub.
        output: directory to make; refused if there is one already. It is a model to transformers, and a run to the
            commands that read journals.
        revision, token: as `huggingface_hub` takes them.

    Returns:
        The directory.

    Raises:
        EstuneError: the hub cannot be reached or has no such model, it holds no journal, or a damaged one.
    """
    from huggingface_hub import snapshot_download

    output = Path(output)
    if output.exists():
        raise EstuneError(f"{output} exists already: give another directory or remove it")
    with replacing(output) as folder:
        try:
            snapshot_download(name, revision=revision, token=token, local_dir=folder)
        except Exception as error:  # the hub's, the network's and the transport's own
            raise EstuneError(
                f"pull {name}: {first_line(error)[:300]}; check the name, the network and your login"
            ) from error
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        if not is_run(folder):
            raise EstuneError(
                f"pull {name}: it holds no journal, so `estune push` did not upload it; give one that it did"
            )
        Journal.read(folder)
    return output


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
            f"push {name}: {' '.join(str(error).split())[:300]}; nothing is lost here: check the name, the network and "
            "your login, then push again"
        ) from error


def _best_step(journal: Journal, place: RunDirectory) -> int:
    """After which step the weights are that a run is known by: its best, if they are there, else its last."""
    best = journal.best
    return best.step if best is not None and (place.best.is_dir() or not place.final.is_dir()) else len(journal.steps)


def _kept(journal: Journal, place: RunDirectory, step: int) -> Path | None:
    """The checkpoint of a step, if the run has kept it."""
    kept = {place.best: journal.best and journal.best.step, place.final: len(journal.steps)}
    return next((folder for folder, at in kept.items() if at == step and folder.is_dir()), None)


def _problems(journal: Journal, place: RunDirectory) -> int:
    """Problems in the held-out set, by what was completed of it; 0 where that is not there."""
    if not journal.evaluations:
        return 0
    file = place.completions(f"evaluation-{journal.evaluations[0].step:05d}")
    if not file.is_file():
        return 0
    samples = journal.settings.get("eval_samples")
    return int(pyarrow.parquet.read_metadata(file).num_rows) // (samples if isinstance(samples, int) else 1)
