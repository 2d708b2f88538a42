"""vLLM as an engine, its weights perturbed in place.

Contact with vLLM's internals is in `internals.py`, `lora.py`, `additions.py` and `server.py`. Begin with `engine.py`,
which generates; `weights.py` perturbs through `worker.py`, which runs inside vLLM and finds each parameter by
`parameter_map.py`.
"""
