"""Agents: a member as a model to talk to, and rollouts, the programs that talk to it and end with a number.

Imports engines and grading. Begin with `play.py`, which plays the rows of a member; `environment.py`, `client.py` and
`program.py` are the three kinds of rollouts.
"""
