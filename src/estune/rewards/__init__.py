"""The reward functions that come with estune, one a file, in TRL's calling convention.

Imports grading. `load.py` finds a function that is given by name.
"""
