"""Agents: a member as a model to talk to, and rollouts, the programs that talk to it and end with a number.

Imports engines and what lies below them. Begin with `play.py`, which plays the rows of a member; `environment.py`,
`client.py` and `program.py` are the three kinds of rollouts. `endpoint.py` is what they talk to: `requests.py` reads
what is asked, `answers.py` writes what comes back, `tools.py` knows how models write tool calls.
"""
