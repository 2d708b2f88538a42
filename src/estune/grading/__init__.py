"""How reward functions are called: the convention, processes with deadlines, and the sandbox for programs.

Imports nothing of ours but `completion` and `errors`. Begin with `grading.py`, which grades for a whole run.
"""

from estune.grading.isolation import Isolation, isolated
from estune.grading.level import corpus_level, population_level
from estune.grading.sandbox import Limits, Outcome, run_code

__all__ = ["Isolation", "Limits", "Outcome", "corpus_level", "isolated", "population_level", "run_code"]
