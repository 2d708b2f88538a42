"""The settings of a run: `sections.py` and `search.py` have them, `config.py` puts them together and reads them.

Imports tasks, whose options are settings too.
"""

from estune.config.config import (
    EMBEDDED_SETTINGS,
    RESUMABLE,
    SECTIONS,
    Config,
    embedded_settings,
    load,
    merge,
    parse,
    read,
)
from estune.config.values import server_url

__all__ = [
    "EMBEDDED_SETTINGS",
    "RESUMABLE",
    "SECTIONS",
    "Config",
    "embedded_settings",
    "load",
    "merge",
    "parse",
    "read",
    "server_url",
]
