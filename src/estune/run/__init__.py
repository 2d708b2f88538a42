"""A run: the trainer's loop, its steps, its directory, resuming, evaluation, and the monitors that show it.

Imports pool, tasks, grading, journal and es. Begin with `trainer.py`, then `step.py` and `standing.py`.
"""
