"""The settings of a run: `sections.py` has them, `config.py` puts them together and reads them from files and options.

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
from estune.config.sections import server_url

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
