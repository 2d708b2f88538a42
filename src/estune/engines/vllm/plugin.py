"""estune as a plugin of vLLM: seeds for its weight transfer (`vllm serve M --weight-transfer-config.backend estune`).

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`) wherever estune is installed: it is
light, and changes nothing for who does not ask for the backend. What a client can ask for over HTTP is another plugin,
`pool/remote/plugin.py`, which the server's owner has to allow by name (VLLM_PLUGINS=estune).

vLLM's own routes for weight transfer are left alone: they are there in its development mode only, where no key is asked
for, and answer with no more than that it was done: no fingerprint could come back.
"""

from __future__ import annotations


def register() -> None:
    """Make the backend known to vLLM, and keep weights plain where it is asked for. May be called again."""
    from estune.engines.vllm.server import register_backend

    register_backend("estune.engines.vllm.transfer", "SeedTransfer")
