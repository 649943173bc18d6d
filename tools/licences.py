"""Check the licences of all dependencies and write docs/reference/licences.md: `python -m tools.licences`.

Licences come from the metadata of the installed packages that `requirements/` locks.
"""

import re
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from tasks.common.runner import run

LOCKS = Path("requirements")
PAGE = Path("docs/reference/licences.md")
HEAD = """# Licences of the dependencies

Written by `python -m tools.licences`, which `make audit` runs. The table has the licence from the metadata of each
package in `requirements/`. A package without a permissive licence needs a reason in `tools/licences.py`; without
one the command fails.
"""

PERMISSIVE = re.compile(
    r"\b(MIT|\d?BSD|Apache|ISC|PSF|Python|CNRI|Unlicense|HPND|MPL|Mozilla|Zope)\b", re.IGNORECASE
)
"""Permissive licences, and licences that, like the MPL, cover their own files only."""

RESTRICTIVE = re.compile(r"GPL|GNU|SSPL|BUSL|Proprietary|Commercial", re.IGNORECASE)
"""Licences that may restrict programs that use the package."""

REASONS = {
    "asyncssh": "used under EPL-2.0, unmodified",
    "chardet": "used unmodified, by the extra capabilities only",
    "dulwich": "used under Apache-2.0",
    "grandalf": "used under EPL-1.0, unmodified",
    "huey": "MIT in its LICENSE file; no licence in the metadata",
    "pygit2": "its linking exception permits use by programs of any licence",
    "skops": "MIT in its LICENSE file; no licence in the metadata",
    "text-unidecode": "used under the Artistic License",
}
"""Why a package may be used if its metadata is not sufficient."""


def main() -> None:
    """Check the licences and write the page."""
    lines, errors, missing = [], [], []
    for name in locked():
        try:
            found = metadata(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        stated = licence(found)
        if not permitted(name, stated):
            errors.append(
                f"{name}: licence '{stated}' is not permissive; review it and add a reason in tools/licences.py"
            )
        lines.append(f"| {name} | {found['Version']} | {stated or 'none'} | {REASONS.get(name, '')} |\n")
    if errors:
        raise InputError("\n".join(errors))
    with atomic_write(PAGE) as tmp:
        table = "| package | version | licence | reason |\n| --- | --- | --- | --- |\n" + "".join(lines)
        tmp.write_text(
            f"{HEAD}\n{table}\nNot checked, because not installed on this machine: {', '.join(missing)}.\n"
        )


def locked() -> list[str]:
    """Return the names of the packages that `requirements/` locks."""
    text = "".join(path.read_text() for path in LOCKS.glob("*.txt"))
    return sorted(set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE)))


def licence(found: PackageMetadata) -> str:
    """Return a package's licence: its SPDX expression, else its classifiers, else the first line of free text."""

    def lines(field: str) -> list[str]:
        return found.get_all(field) or []

    classifiers = [line for line in lines("Classifier") if line.startswith("License :: ")]
    named = "; ".join(line.split(" :: ")[-1] for line in classifiers if not line.endswith("OSI Approved"))
    free_text = "".join(lines("License")).strip().split("\n")[0]
    return "".join(lines("License-Expression")) or named or free_text


def permitted(name: str, stated: str) -> bool:
    """Return whether a package may be used without a review."""
    return name in REASONS or bool(PERMISSIVE.search(stated) and not RESTRICTIVE.search(stated))


if __name__ == "__main__":
    run(main)
