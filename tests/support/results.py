"""Hashes of a project's results, to compare runs."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEASURED = ("minutes", "peak_memory_gib")
"""Keys of values that differ between equal runs."""


def result_hashes(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """Return the hashes of the files that match a pattern, by path, without provenance and measured values."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return {
        str(file.relative_to(folder)): hashlib.sha256(_content(file)).hexdigest()
        for file in sorted(files)
        if file.name != "provenance.json"
    }


def _content(file: Path) -> bytes:
    if file.suffix != ".json":
        return file.read_bytes()
    return json.dumps(_without_measured(json.loads(file.read_bytes()))).encode()


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measured(each) for key, each in value.items() if key not in MEASURED}
    return [_without_measured(each) for each in value] if isinstance(value, list) else value
