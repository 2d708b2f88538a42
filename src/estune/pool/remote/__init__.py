"""Workers behind HTTP: vLLM servers anywhere, which are told seeds and coefficients and answer token ids.

Begin with `pool.py`, which a run has; `handle.py` speaks to one server in the words of `wire.py`. On the other side
`plugin.py` is loaded by vLLM and `service.py` answers.
"""
