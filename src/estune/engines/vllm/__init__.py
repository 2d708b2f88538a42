"""vLLM as an engine, its weights perturbed in place.

All contact with vLLM's internals is in `internals.py`. Begin with `engine.py`, which generates; `weights.py` perturbs
through `worker.py`, which runs inside vLLM and finds each parameter by `parameter_map.py`.
"""
