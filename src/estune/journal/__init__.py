"""The run's record of seeds and coefficients, and what is made of it without an engine.

Imports weights, es, noise and the words of charts. Begin with `journal.py`; `replay.py` rebuilds a checkpoint after any
step.
"""

from estune.journal.journal import Journal

__all__ = ["Journal"]
