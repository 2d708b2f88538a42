"""Agents: a member as a model to talk to, and rollouts, the programs that talk to it and end with a number.

Imports engines and what lies below them. Begin with `play.py`, which plays the rows of a member; `environment.py`,
`client.py`, `program.py` and `verifiers.py` are the kinds of rollouts. `endpoint.py` is what they talk to:
`clients.py` are those who have a key, `answering.py` takes a request, which `requests.py` reads, to its answer, which
`answers.py` writes; `tools.py` knows how models write tool calls.
"""
