"""The one exception a user's input can raise."""


class EstuneError(ValueError):
    """Something the user can mend. The message is one line: what, where, what was found, what to do."""
