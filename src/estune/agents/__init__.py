"""A model behind an OpenAI-compatible endpoint, for programs that talk to one.

Imports engines and what lies below them. Begin with `endpoint.py`; `requests.py` reads what is asked, `answers.py`
writes what comes back, `tools.py` knows how models write tool calls.
"""
