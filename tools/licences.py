"""Licences of all dependencies: `python -m tools.licences` checks them and writes docs/licences.md.

They are read from the metadata of what is installed, for every package that `requirements/` locks.
"""

import re
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata
from pathlib import Path

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from tasks.common.runner import run

LOCKS = Path("requirements")
PAGE = Path("docs/licences.md")
HEAD = """# Licences of the dependencies

Written by `python -m tools.licences`, which `make audit` runs: the licence that each package of `requirements/`
states, and why one may be used whose licence is none of the permissive ones. Without a reason such a package stops
the command.
"""

FREE = re.compile(r"\b(MIT|\d?BSD|Apache|ISC|PSF|Python|CNRI|Unlicense|HPND|MPL|Mozilla|Zope)\b", re.IGNORECASE)
"""Licences that ask for their text, or like the MPL for their own files, and nothing of what is built on them."""

BOUND = re.compile(r"GPL|GNU|SSPL|BUSL|Proprietary|Commercial", re.IGNORECASE)
"""Licences that may ask for more."""

REASONS = {
    "asyncssh": "EPL-2.0 is chosen; used as it is",
    "dulwich": "Apache-2.0 is chosen",
    "grandalf": "EPL-1.0 is chosen; used as it is",
    "huey": "its LICENSE file is the MIT licence; the metadata states none",
    "pygit2": "its linking exception lets programs of any licence use it",
    "skops": "its LICENSE file is the MIT licence; the metadata names none",
    "text-unidecode": "the Artistic License is chosen",
}
"""Why packages may be used whose metadata alone does not tell."""


def main() -> None:
    """Read, check, write."""
    lines, faults, absent = [], [], []
    for name in locked():
        try:
            found = metadata(name)
        except PackageNotFoundError:
            absent.append(name)
            continue
        stated = licence(found)
        if not permitted(name, stated):
            faults.append(f"{name}: licence '{stated}'; look at it, then give a reason in tools/licences.py")
        lines.append(f"| {name} | {found['Version']} | {stated or 'none'} | {REASONS.get(name, '')} |\n")
    if faults:
        raise InputError("\n".join(faults))
    with atomic_write(PAGE) as tmp:
        table = "| package | version | licence | why |\n| --- | --- | --- | --- |\n" + "".join(lines)
        tmp.write_text(f"{HEAD}\n{table}\nNot installed on this machine, so not checked: {', '.join(absent)}.\n")


def locked() -> list[str]:
    """Names of the packages that `requirements/` locks."""
    text = "".join(path.read_text() for path in LOCKS.glob("*.txt"))
    return sorted(set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE)))


def licence(found: PackageMetadata) -> str:
    """What a package's metadata states: an SPDX expression, else classifiers, else the first line of free text."""

    def lines(field: str) -> list[str]:
        return found.get_all(field) or []

    classifiers = [line for line in lines("Classifier") if line.startswith("License :: ")]
    named = "; ".join(line.split(" :: ")[-1] for line in classifiers if not line.endswith("OSI Approved"))
    free_text = "".join(lines("License")).strip().split("\n")[0]
    return "".join(lines("License-Expression")) or named or free_text


def permitted(name: str, stated: str) -> bool:
    """Whether a package may be used without anybody looking at it."""
    return name in REASONS or bool(FREE.search(stated) and not BOUND.search(stated))


if __name__ == "__main__":
    run(main)
