"""Errors that are the user's to mend."""


class InputError(ValueError):
    """Bad input; the message names the file, the row or key, and the mend."""


class Stopped(Exception):
    """The work was asked to stop; what it had done is kept, and doing it again goes on from there."""
