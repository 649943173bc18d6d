"""Functions of the user, which `params.yaml` names as `module:function`.

Their modules are in folders that DVC tracks, so that a change of the code makes the results stale.
"""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import sha256

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Kind:
    """What a setting needs: the parameters of the function and the folder of its module."""

    parameters: tuple[str, ...]
    folder: Path
    ours: Path | None = None
    """Folder in the package `dpo` whose functions can be named, too."""

    def check(self, name: str, where: str) -> None:
        """Check that a function can be called, and that DVC tracks all code of the project that it imports.

        Functions of this package are looked up, but not imported, which would take seconds.

        Raises:
            InputError: one line with the setting `where`, the function and the fix.
        """
        module, _, attribute = name.partition(":")
        file = _file_of(module)
        if file is not None and self.ours and file.is_relative_to(self.ours):
            if attribute not in _names(file):
                raise InputError(
                    f"{where}: '{name}' cannot be imported: {file.name} has no '{attribute}'; {self._fix}"
                )
            return
        if file is None or not file.is_relative_to(self.folder):
            raise InputError(f"{where}: '{name}' cannot be imported: it is not in {self.folder}/; {self._fix}")
        for used in sorted(_imported_files(file)):
            if not used.is_relative_to(self.folder):
                raise InputError(
                    f"{where}: '{name}' imports {used}, which DVC does not track for this function; move it to "
                    f"{self.folder}/"
                )
        self.load(name, where)

    def load(self, name: str, where: str) -> Callable[..., Any]:
        """Import a function.

        Raises:
            InputError: it cannot be imported, or does not accept the parameters.
        """
        module, _, attribute = name.partition(":")
        if not {"", str(Path.cwd())} & set(sys.path):  # the console script and Prefect start without it
            sys.path.append(str(Path.cwd()))
        try:
            function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(f"{where}: '{name}' cannot be imported: {reason}; {self._fix}") from error
        try:
            inspect.signature(function).bind(*self.parameters)
        except (TypeError, ValueError) as error:
            call = f"{attribute}({', '.join(self.parameters)})"
            raise InputError(f"{where}: '{name}' cannot be called as {call}: {error}; {self._fix}") from error
        return function

    def digest(self, name: str) -> str:
        """Return the SHA-256 of all files in the folder of a function, or of its module if it is elsewhere."""
        file = _file_of(name.partition(":")[0])
        if file is None:
            return ""
        folders = [folder for folder in (self.folder, self.ours) if folder and file.is_relative_to(folder)]
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        return sha256(*(path for path in files or [file] if path.suffix != ".pyc"))

    @property
    def _fix(self) -> str:
        module = ".".join(self.folder.parts)
        return (
            f"write it as module:function, for example '{module}.mine:mine' for a function "
            f"mine({', '.join(self.parameters)}) in {self.folder}/mine.py"
        )


LOSS = Kind(("pairs", "beta"), Path("functions/losses"))
JUDGE = Kind(("prompts", "responses"), Path("functions/judges"), PACKAGE / "evaluation/judges")


def _file_of(module: str) -> Path | None:
    """Return the file of a module of the project, or None if there is none."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    place = Path(*parts) if parts[0] != "dpo" else PACKAGE.joinpath(*parts[1:])
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _names(file: Path) -> set[str]:
    """Return the names of functions that a module defines or imports."""
    names = set()
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _imported_files(file: Path) -> set[Path]:
    """Return the project's files outside this package that a module imports, directly or not."""
    found, waiting = {file}, [file]
    while waiting:
        names = _imports(waiting.pop())
        files = {each for each in map(_file_of, names) if each and not each.is_relative_to(PACKAGE)}
        waiting += files - found
        found |= files
    return found


def _imports(file: Path) -> Iterator[str]:
    """Yield the modules that a file may import: of `from a import b`, both a and a.b. Invalid code has none."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = file.with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))
