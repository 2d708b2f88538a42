"""Who evaluates which member: an engine in this process, several on this machine, or workers on a cluster.

Imports engines, weights and journal. Begin with `base.py`, the protocol; `open.py` chooses.
"""

from estune.pool.base import Pool

__all__ = ["Pool"]
