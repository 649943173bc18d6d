"""Write docs/reference/settings.md from the settings classes: `python -m tools.settings_reference`.

Keys, types and defaults are those of the dataclasses under `dpo.config.Params`, descriptions are the docstrings of
their attributes.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from dpo.common.files import atomic_write
from dpo.config import Params

PAGE = Path("docs/reference/settings.md")
HEAD = """# Settings

Written by `python -m tools.settings_reference` from the settings classes (`dpo/config.py`, `dpo/*/settings.py`).

`params.yaml` lists the settings that most projects change. To set a key that is not listed, add it to its section
of the file, or set it for one run: `dvc exp run -S '+validate.max_drift=0.5'`. Unknown keys and values of another
type are errors.
"""
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def main() -> None:
    """Write the page."""
    with atomic_write(PAGE) as tmp:
        tmp.write_text(render(Params))


def render(root: type) -> str:
    """Return the page for a settings class and all classes below it."""
    keys = dict(_fields(root))
    parts = [HEAD, _table("", {key: field for key, field in keys.items() if not list(_sections(key, field[1]))})]
    for key, (_, hint, about) in keys.items():
        if _is_mapping(hint):
            parts += [f"## {key}\n", f"{about}\n"]
        for path, cls in _sections(key, hint):
            parts += _section(path, cls)
    return "\n".join(parts)


def _section(path: str, cls: type) -> Iterator[str]:
    """Yield heading, description and table of a class, then those of the classes below it."""
    kind = typing.get_type_hints(cls).get("kind")
    variant = f", kind {typing.get_args(kind)[0]}" if typing.get_origin(kind) is typing.Literal else ""
    yield f"{'###' if '.' in path else '##'} {path}{variant}\n"
    yield f"{_docstring(cls)}\n"
    fields = dict(_fields(cls))
    if fields:
        yield _table(path, fields)
    for name, (_, hint, _) in fields.items():
        for below, inner in _sections(f"{path}.{name}", hint):
            yield from _section(below, inner)


def _sections(path: str, hint: Any) -> Iterator[tuple[str, type]]:
    """Yield (key, class) of the settings classes in a type. A mapping has the keys of its registry."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield path, hint
    elif _is_mapping(hint) and dataclasses.is_dataclass(_mapping_arguments(hint)[1]):
        for name, cls in _registry(_mapping_arguments(hint)[1]).items():
            yield f"{path}.{name}", cls
    elif typing.get_origin(hint) is not typing.Literal:
        for inner in typing.get_args(hint):
            yield from _sections(path, inner)


def _registry(base: type) -> dict[str, type]:
    """Return the mapping of names to subclasses in the module or package of `base`, such as `LOSSES`."""
    places = (base.__module__, base.__module__.rpartition(".")[0])
    return next(
        value
        for place in places
        for value in vars(sys.modules[place]).values()
        if isinstance(value, dict)
        and value
        and all(isinstance(c, type) and issubclass(c, base) for c in value.values())
    )


def _is_mapping(hint: Any) -> bool:
    return bool(_mapping_arguments(hint))


def _mapping_arguments(hint: Any) -> tuple[Any, ...]:
    """Return the key and value types of a mapping, or nothing for other types."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin = typing.get_origin(hint)
    return typing.get_args(hint) if inspect.isclass(origin) and issubclass(origin, Mapping) else ()


def _table(path: str, fields: Mapping[str, tuple[Any, Any, str]]) -> str:
    lines = ["| Key | Type | Default | Description |", "| --- | --- | --- | --- |"]
    for name, (default, hint, about) in fields.items():
        cells = [f"`{path}.{name}`" if path else f"`{name}`", _type(hint), _default(default), about]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _fields(cls: type) -> Iterator[tuple[str, tuple[Any, Any, str]]]:
    """Yield (name, (default, type, description)) of each field; the default is MISSING if the key is required."""
    hints, about = typing.get_type_hints(cls, include_extras=True), _descriptions(cls)
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        yield field.name, (default, hints[field.name], about.get(field.name, ""))


def _descriptions(cls: type) -> dict[str, str]:
    """Return the docstring under each attribute of a class and its bases."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # a class made by `make_dataclass` has no source
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for statement, after in itertools.pairwise(body):
            target = statement.target if isinstance(statement, ast.AnnAssign) else None
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(target, ast.Name) and isinstance(text, ast.Constant):
                found[target.id] = " ".join(str(text.value).split())
    return found


def _docstring(cls: type) -> str:
    paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _type(hint: Any) -> str:
    """Return a type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [word for extra in arguments[1:] for word in _bounds(extra)]
        return f"{_type(arguments[0])} {' and '.join(bounds)}".rstrip()
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if origin in (tuple, list):
        return f"list of {_type(arguments[0])}"
    if _is_mapping(hint):
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    return "section" if dataclasses.is_dataclass(hint) else NAMES.get(hint, str(hint))


def _bounds(extra: object) -> list[str]:
    """Return the limits that an annotation sets."""
    if isinstance(extra, FieldInfo):
        return [word for each in extra.metadata for word in _bounds(each)]
    return [
        f"{word} {limit}" for name, word in BOUNDS.items() if (limit := getattr(extra, name, None)) is not None
    ]


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    return "below" if dataclasses.is_dataclass(value) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    main()
