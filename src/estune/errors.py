"""The one exception that a user's input can raise, and how other errors and texts are shown."""

ACCEPT = "--accept-changes (in Python accept_changes=True)"
"""How to tell a run to go on although something has changed, from the command line or in Python, for messages."""


class EstuneError(ValueError):
    """Something the user can mend. The message is one line: what, where, what was found, what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """A text without characters that move a terminal's cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def printable_lines(text: str) -> str:
    """A text without characters that move a terminal's cursor, except for the ends of its lines."""
    return "\n".join(map(printable, text.expandtabs().replace("\r\n", "\n").split("\n")))
