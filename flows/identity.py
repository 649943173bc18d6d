"""The name of this checkout in Prefect: `python -m flows.identity` prints it.

Work pool, deployments and artifacts carry the name, so that two checkouts never take each other's runs. It is the
name of the folder and a random part, kept in `.prefect/project.json`. A moved checkout keeps its name; a copy gets
a name of its own.
"""

import json
import re
import secrets
from pathlib import Path

from filelock import FileLock

from dpo.common.files import write_json

FILE = Path(".prefect/project.json")
PROJECT = "DPO_PROJECT"
"""Environment variable of the worker with the name of its checkout; `prefect.yaml` compares it."""


def project() -> str:
    """Return the name of the checkout in the current folder."""
    here = str(Path.cwd())
    known = _recorded(Path())
    if known.get("folder") == here:
        return known["name"]
    FILE.parent.mkdir(exist_ok=True)
    with FileLock(f"{FILE}.lock"):
        known = _recorded(Path())
        name = known.get("name")
        is_copy = name and known["folder"] != here and _recorded(Path(known["folder"])).get("name") == name
        if name is None or is_copy:
            slug = re.sub(r"[^a-z0-9]+", "-", Path(here).name.lower()).strip("-")
            name = f"{slug or 'project'}-{secrets.token_hex(3)}"
        write_json(FILE, {"name": name, "folder": here})
    return name


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    print(project())  # noqa: T201
