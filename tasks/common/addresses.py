"""Addresses in messages and on pages."""

import os
import re
from urllib.parse import urlsplit

from dpo.common.errors import InputError

CREDENTIALS = re.compile(r"(\w[\w+.-]*://)[^\s/?#'\"]*@")
"""The start of an address with a user or a password."""

MLFLOW_PAGES = "DPO_MLFLOW_PAGES"
"""Environment variable with the address of MLflow's UI, used if MLFLOW_TRACKING_URI is not a server."""


def shown(address: str) -> str:
    """Return a path or URL for messages: printable, without user, password and query."""
    printable = address.encode(errors="backslashreplace").decode()
    parts = urlsplit(printable)
    if parts.scheme and parts.netloc:
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return printable


def mlflow_site() -> str:
    """Return the address of MLflow's UI, or an empty string if none is known."""
    site = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not site.startswith(("http://", "https://")):
        site = os.environ.get(MLFLOW_PAGES, "")
    return site.rstrip("/")


def without_credentials(text: str) -> str:
    """Return a message without user and password in the addresses that it names."""
    return CREDENTIALS.sub(r"\1", text)


def refuse_credentials(name: str, address: str) -> None:
    """Raise InputError if an address that is stored or shown has a user or a password."""
    if CREDENTIALS.match(address):
        raise InputError(
            f"{name}: {shown(address)}: the address contains a user or a password; remove them and set them in "
            "the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
