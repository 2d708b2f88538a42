"""A journal as a file to give away."""

from __future__ import annotations

import shutil
from pathlib import Path

from estune.errors import EstuneError
from estune.files import replacing
from estune.journal import compact
from estune.journal.journal import Journal
from estune.journal.signature import signature_of


def pack(run: str | Path, output: str | Path) -> int:
    """Write a run's journal, with those that it goes on from, as one file in the compact form.

    A signature goes along, beside it.

    Args:
        run: its directory, or its journal in the compact form.
        output: file to write, by custom `NAME.estune`; refused if there is one already.

    Returns:
        Its size in bytes.

    Raises:
        EstuneError: there is no journal, it is damaged, or the file cannot be written.
    """
    output = Path(output)
    if output.exists():
        raise EstuneError(f"{output} exists already: give another file or remove it")
    journal = Journal.read(Path(run))
    content = compact.pack(journal.texts())
    with replacing(output) as temporary:
        temporary.write_bytes(content)
    if (signature := signature_of(journal)).is_file():
        shutil.copy(signature, signature_of(Journal.read(output)))
    return len(content)
