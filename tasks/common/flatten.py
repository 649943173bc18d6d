"""Nested settings and metrics as rows."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


def flatten(nested: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value inside nested mappings and dataclasses with the path of names that leads to it."""
    for name, value in nested.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping):
            yield from flatten(value, (*prefix, name))
        else:
            yield (*prefix, name), value
