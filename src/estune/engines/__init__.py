"""Engines: prompts in, completions out. `transformers.py` decodes with a model's own forward, `vllm/` with vLLM.

Imports weights and completion. Begin with `transformers.py`, then `decode.py`, the loop.
"""
