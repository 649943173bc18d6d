"""Rewrite the absolute paths in MLflow's SQLite store after the checkout was moved, copied or restored elsewhere.

MLflow stores where the artifacts of runs and models are as absolute paths. The former folder of the checkout is
known from the experiment's artifact location, which is `FOLDER/mlruns/ID`.
"""

import logging
import re
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote, unquote

import psutil

WORKSPACE = "DPO_WORKSPACE"
"""Environment variable of servers and workers with the folder of the checkout that they were started for."""
LOCATIONS = {"artifact_location", "artifact_uri", "source", "storage_location"}
"""Columns with paths of artifacts."""

log = logging.getLogger(__name__)


def relocate(store: Path) -> None:
    """Make the paths in a store of this folder those of this folder, in one transaction.

    Servers that still run from the former folder are reported. A store in another folder may be shared, so it is
    kept.
    """
    folder = Path.cwd()
    if store.absolute().parent != folder or not store.exists():
        return
    with closing(sqlite3.connect(store, timeout=60, isolation_level=None)) as database:
        if not (former := _former_folders(database, folder)):
            return
        columns = [(table, name) for table, name in _columns(database) if name in LOCATIONS]
        database.execute("BEGIN IMMEDIATE")
        try:
            for prefix in former:
                target = _same_form(prefix, folder)
                for table, name in columns:
                    database.execute(
                        f'UPDATE "{table}" SET "{name}" = ? || substr("{name}", ?) '
                        f'WHERE substr("{name}", 1, ?) = ?',  # nosec B608  # names are those of the schema
                        (target, len(prefix) + 1, len(prefix) + 1, f"{prefix}/"),
                    )
            database.execute("COMMIT")
        except BaseException:
            database.execute("ROLLBACK")
            raise
    for prefix in former:
        place = _path(prefix)
        log.warning("%s: the paths of %s are now those of %s", store, place, folder)
        if running := servers_of(place):
            log.warning(
                "still running from %s: %s; stop them with `make down` there, or with `kill`", place, running
            )


def servers_of(folder: Path) -> str:
    """Return the servers and workers that were started for a folder, as text."""
    found = {}
    for process in psutil.process_iter(["environ", "ppid", "name"]):
        with suppress(psutil.Error):
            if (process.info["environ"] or {}).get(WORKSPACE) == str(folder):
                found[process.pid] = process
    roots = [each for each in found.values() if each.info["ppid"] not in found]
    return ", ".join(f"process {each.pid} ({each.info['name']})" for each in roots)


def _former_folders(database: sqlite3.Connection, folder: Path) -> list[str]:
    """Return the prefixes of artifact locations before `/mlruns/`, if they are not this folder.

    A location of another place that still exists and of which this folder has no copy is kept.
    """
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
        return []
    found = set()
    rows = database.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
    for number, location in rows:
        match = re.fullmatch(r"((?:file://)?/.*)/mlruns/([^/]+)", location or "")
        if match is None or match[2] != str(number) or _path(match[1]) == folder:
            continue
        if (folder / "mlruns" / match[2]).exists() or not _path(location).exists():
            found.add(match[1])
    return sorted(found, key=len, reverse=True)


def _path(location: str) -> Path:
    return Path(unquote(location.removeprefix("file://"))) if location.startswith("file://") else Path(location)


def _same_form(prefix: str, folder: Path) -> str:
    """Return a folder as MLflow writes it: as a path or as a file URI."""
    return f"file://{quote(str(folder))}" if prefix.startswith("file://") else str(folder)


def _columns(database: sqlite3.Connection) -> list[tuple[str, str]]:
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return [(table, row[1]) for table in tables for row in database.execute(f'PRAGMA table_info("{table}")')]
