"""Addresses in messages."""

from urllib.parse import urlsplit


def shown(address: str) -> str:
    """Return a path or URL for messages: printable, without user, password and query."""
    printable = address.encode(errors="backslashreplace").decode()
    parts = urlsplit(printable)
    if parts.scheme and parts.netloc:
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return printable
