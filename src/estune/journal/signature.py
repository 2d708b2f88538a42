"""A signature of a journal by its author's SSH key, which OpenSSH makes and checks.

What is signed is `Journal.sha256`, in a line of text: so one signature holds for the journal as JSON lines and in the
compact form.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from estune.errors import EstuneError
from estune.files import replacing
from estune.journal import compact
from estune.journal.journal import FILE, Journal

SIGNATURE = "journal.sig"
_NAMESPACE = "estune"  # so that no signature made for something else is taken for one
_WHO = "author"


def sign(run: str | Path, key: str | Path) -> Path:
    """Sign a run's journal as it is now.

    Args:
        run: the run's directory, or its journal in the compact form.
        key: file of a private SSH key, such as `~/.ssh/id_ed25519`; ssh-keygen asks for its passphrase.

    Returns:
        The signature's file, beside the journal.

    Raises:
        EstuneError: there is no journal or no such key, or ssh-keygen is not installed or refuses.
    """
    journal = Journal.read(Path(run))
    if not Path(key).expanduser().is_file():
        raise EstuneError(f"--key {key}: no such file; make a key by `ssh-keygen -t ed25519 -f {key}`")
    target = signature_of(journal)
    with TemporaryDirectory(prefix="estune-signature-") as folder:
        statement = Path(folder) / "statement"
        statement.write_text(_statement(journal))
        _keygen("sign", "-f", str(Path(key).expanduser()), "-n", _NAMESPACE, str(statement))
        with replacing(target) as temporary:
            shutil.copy(statement.with_suffix(".sig"), temporary)
    return target


def refuse_unsigned(journal: Journal, key: str | Path) -> None:
    """Refuse a journal that the owner of a key has not signed as it is.

    Args:
        journal: the run's.
        key: file of the public key, as `ssh-keygen` writes it (`.pub`).

    Raises:
        EstuneError: there is no signature, it is of another journal, or by another key.
    """
    signature = signature_of(journal)
    if not signature.is_file():
        raise EstuneError(
            f"{journal.run} is not signed: there is no {signature}; its author makes one by `estune sign`"
        )
    try:
        words = Path(key).expanduser().read_text().split()
    except (OSError, ValueError) as error:
        raise EstuneError(f"--signed-by {key}: no file that can be read; give a public key, such as KEY.pub") from error
    if len(words) < 2 or "PRIVATE" in words:
        raise EstuneError(f"--signed-by {key} is no public key; give the one that ends in .pub")
    with TemporaryDirectory(prefix="estune-signature-") as folder:
        allowed = Path(folder) / "allowed"
        allowed.write_text(f'{_WHO} namespaces="{_NAMESPACE}" {words[0]} {words[1]}\n')
        options = ("-f", str(allowed), "-I", _WHO, "-n", _NAMESPACE, "-s", str(signature))
        try:
            _keygen("verify", *options, said=_statement(journal))
        except EstuneError as error:
            raise EstuneError(
                f"{signature}: not a signature of this journal by {key}: the journal was changed since, or another key "
                f"signed it ({error})"
            ) from error


def signature_of(journal: Journal) -> Path:
    """Where a journal's signature lies: in a run's directory, or beside a file in the compact form, under its name."""
    name = SIGNATURE if journal.path.name in (FILE, compact.FILE) else f"{journal.path.stem}.sig"
    return journal.path.parent / name


def _statement(journal: Journal) -> str:
    return f"estune journal sha256 {journal.sha256()}\n"


def _keygen(what: str, *options: str, said: str = "") -> None:
    command = ["ssh-keygen", "-Y", what, *options]
    try:
        # A terminal that is there is what it asks for a passphrase on.
        subprocess.run(command, input=said, check=True, text=True, capture_output=True)
    except FileNotFoundError as error:
        raise EstuneError("ssh-keygen is not installed, which makes and checks signatures: install OpenSSH") from error
    except subprocess.CalledProcessError as error:
        why = " ".join((error.stderr or error.stdout).split())[:200]
        raise EstuneError(f"ssh-keygen -Y {what}: {why}") from error
