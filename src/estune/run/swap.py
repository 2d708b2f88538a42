"""A run's weights into a vLLM that serves their base model, in place: no checkpoint is written or loaded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from estune.config import server_url
from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.pool.deadlines import Deadlines
from estune.pool.remote.handle import RemoteHandle, key_of_environment, refuse_other_base
from estune.pool.remote.pool import new_lease
from estune.pool.remote.wire import Swapped, Terms
from estune.pool.slots import compare
from estune.pool.worker import software

KEPT = 2


def swap(server: Any, run: str | Path, step: int | None = None, *, keep: int = KEPT) -> Swapped:
    """Make a server serve a run's weights after some step.

    What it served before goes on until the new weights are there; requests under way then come to their ends, and those
    that come meanwhile wait for as long as one pass over the weights takes.

    Args:
        server: its address, as http://HOST:PORT, with its key in VLLM_API_KEY; or a `vllm.LLM` of this process. Both
            have been started with estune as a plugin and its backend of weight transfer.
        run: the run's directory, or its journal in the compact form.
        step: after how many steps; all by default; 0 gives the weights that the run started from.
        keep: bases that the server may keep in its memory, the latest; coming back to one costs no replay.

    Returns:
        The fingerprint of what is served now, which is the one recorded, and how it came about.

    Raises:
        EstuneError: the run has no such step, or the server is not there, refuses the key, has another model, or is at
            work for a run.
    """
    journal = Journal.read(Path(run), step)
    header = journal.header
    if header.rule.how.drifts:
        raise EstuneError(f"{run}: weights={header.policy} drift, and a server keeps a base: `estune replay` has them")
    pattern = str(journal.settings.get("train_parameters", "*"))
    scales = journal.settings.get("sigma_scale", {})
    terms = Terms(new_lease(), header.policy, header.rounding, header.noise, pattern, sigma_scale=scales)
    base = {
        "base_hash": header.base_hash,
        "rule": header.rule,
        "tensors": header.tensors,
        **({"files": journal.files} if journal.files else {}),
    }
    asked = [record.update for record in journal.history], journal.fingerprint(), keep
    if not isinstance(server, str):
        return _swap_here(server, terms, base, asked)
    try:
        url = server_url(server)
    except ValueError as error:
        raise EstuneError(str(error)) from error
    handle = RemoteHandle(0, url, key_of_environment(), terms, base, None, Deadlines(None))
    try:
        place = handle.look(0.0)
        if place is None:
            raise EstuneError(f"{handle.url}: {handle.absent}: start it, or mend the address")
        ours = software()
        compare(handle, place.software, {key: ours[key] for key in ("estune", "noise", "journal")})
        handle.open()
        found: Swapped = handle.call("swap", *asked, units=len(journal.history))
    finally:
        handle.end()
    return found


def _swap_here(llm: Any, terms: Terms, base: dict[str, Any], asked: tuple[Any, ...]) -> Swapped:
    """The same in this process; the engine remembers what it serves."""
    from estune.engines.vllm.served import ServedEngine
    from estune.engines.vllm.server import BACKEND, Model, backend_of
    from estune.pool.remote.plugin import service_over
    from estune.pool.remote.service import Failed

    model = Model(llm)
    if backend_of(model.config) != BACKEND:
        raise EstuneError(f"start it as LLM(..., weight_transfer_config={{'backend': '{BACKEND}'}})")
    if not hasattr(llm, "_estune"):
        llm._estune = service_over(ServedEngine(model))
    service = llm._estune
    try:
        refuse_other_base("LLM", service.run("open", terms.lease, (terms,)).description, base)
        found: Swapped = service.run("swap", terms.lease, asked)
        return found
    except Failed as failed:
        raise EstuneError(str(failed)) from failed
    finally:  # for the next one, also where this one failed
        with suppress(Failed):
            service.run("release", terms.lease, ())
