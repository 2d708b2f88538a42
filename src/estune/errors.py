"""The one exception a user's input can raise, and what of others' errors and texts may be shown."""

ACCEPT = "--accept-changes (in Python accept_changes=True)"
"""How a run is told to go on although something has changed; for messages, which may be read in either kind of run."""


class EstuneError(ValueError):
    """Something the user can mend. The message is one line: what, where, what was found, what to do."""


def first_line(error: BaseException) -> str:
    """An error's first line that says something, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """A text in which nothing moves a terminal's cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def printable_lines(text: str) -> str:
    """A text in which nothing but the ends of its lines moves a terminal's cursor."""
    return "\n".join(map(printable, text.expandtabs().replace("\r\n", "\n").split("\n")))
