"""Signed journals: altered ones and other people's are refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.share import pack
from estune.journal.signature import refuse_unsigned, sign
from tests.journal.histories import forge, write_history

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs OpenSSH")


def make_key(file: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file


@pytest.fixture
def signed(model: Path, tmp_path: Path) -> Path:
    write_history(tmp_path / "run", model, final=False)
    assert sign(tmp_path / "run", make_key(tmp_path / "key")) == tmp_path / "run" / "journal.sig"
    return tmp_path / "run"


def test_a_signature_holds_in_either_form_and_for_nobody_else(signed: Path, tmp_path: Path) -> None:
    refuse_unsigned(Journal.read(signed), tmp_path / "key.pub")
    pack(signed, tmp_path / "mailed.estune")
    assert (tmp_path / "mailed.sig").is_file()
    refuse_unsigned(Journal.read(tmp_path / "mailed.estune"), tmp_path / "key.pub")
    make_key(tmp_path / "mallory")
    with pytest.raises(EstuneError, match=r"not a signature of this journal by .*mallory.pub"):
        refuse_unsigned(Journal.read(signed), tmp_path / "mallory.pub")


def test_a_journal_altered_with_all_checksums_made_anew_is_refused(signed: Path, tmp_path: Path) -> None:
    forge(signed, 1, rewards=[9.0] * 4)
    assert Journal.read(signed).steps[1].rewards == [9.0] * 4
    with pytest.raises(EstuneError, match="the journal was changed since"):
        refuse_unsigned(Journal.read(signed), tmp_path / "key.pub")


def test_a_signature_made_for_something_else_does_not_count(signed: Path, tmp_path: Path) -> None:
    statement = tmp_path / "statement"
    statement.write_text(f"estune journal sha256 {Journal.read(signed).sha256()}\n")
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(tmp_path / "key"), "-n", "file", str(statement)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.copy(tmp_path / "statement.sig", signed / "journal.sig")
    with pytest.raises(EstuneError, match="not a signature of this journal"):
        refuse_unsigned(Journal.read(signed), tmp_path / "key.pub")


def test_what_is_no_key_or_no_signature(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="no such file; make a key by `ssh-keygen"):
        sign(signed, tmp_path / "none")
    with pytest.raises(EstuneError, match="ssh-keygen -Y sign: "):
        sign(signed, signed / "journal.jsonl")
    with pytest.raises(EstuneError, match="is no public key"):
        refuse_unsigned(Journal.read(signed), tmp_path / "key")
    with pytest.raises(EstuneError, match="no file that can be read"):
        refuse_unsigned(Journal.read(signed), tmp_path / "none")
    (signed / "journal.sig").unlink()
    with pytest.raises(EstuneError, match="is not signed"):
        refuse_unsigned(Journal.read(signed), tmp_path / "key.pub")
