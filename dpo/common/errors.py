"""Errors that end a command with one message."""


class InputError(ValueError):
    """Bad input. The message names the file, the row or key, and the fix."""


class TransientError(RuntimeError):
    """A fault that may disappear without a change, such as an unreachable server. Retry later."""


class Stopped(Exception):
    """The work was interrupted on request. Its completed parts are kept, and the next run resumes from them."""
