"""Errors that are the user's to mend."""


class InputError(ValueError):
    """Bad input; the message names the file, the row or key, and the mend."""
