"""Atomic writes and content hashes of files."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PROVENANCE = "provenance.json"
"""File in a checkpoint that records how it was made."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, which replaces `path` if the block succeeds."""
    tmp, previous = (path.with_name(f".{path.name}.{name}.partial") for name in ("new", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(tmp)
    try:
        yield tmp
        if tmp.is_dir() and path.exists():  # no system call replaces a folder
            _remove(previous)
            path.rename(previous)
        tmp.replace(path)
        _remove(previous)
    except SafetensorError as error:  # its message has no file name, and the errno only as text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        _remove(tmp)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder. Its files are hard links to those of `source`, or copies if the file system has no links."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with sorted keys. NaN and infinity raise ValueError."""
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of the names and contents of files, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def md5(path: Path) -> str:
    """Return the MD5 of a file, as in `dvc.lock`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
