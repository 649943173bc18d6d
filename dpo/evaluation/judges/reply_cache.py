"""Replies of LLM judges on disk, so that each one is paid for once.

`.judge-cache/` has all replies of this checkout. The stages store the replies that they use in their outputs, and
the stage `compare` collects these in `SHARED`, so that `dvc push` and `dvc pull` exchange them. `SHARED` is read
by stages that do not depend on it: a stored reply never changes a result, it only saves a request.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from dpo.common.errors import InputError
from dpo.evaluation.settings import SHARED_REPLIES

FOLDER = Path(".judge-cache")
SHARED = Path(SHARED_REPLIES)


@dataclass(frozen=True)
class Reply:
    """The reply of a server and its token counts; None if the server does not report them."""

    text: str
    truncated: bool
    input_tokens: int | None
    output_tokens: int | None


def read_reply(key: str) -> Reply | None:
    """Return the reply to a request, or None if there is none yet."""
    with _database() as database:
        row = database.execute("SELECT * FROM replies WHERE key = ?", [key]).fetchone()
    return row and Reply(row[1], bool(row[2]), *row[3:])


def write_reply(key: str, reply: Reply) -> None:
    """Save a reply. If another process saved one first, keep that one."""
    with _database() as database:
        database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", [key, *astuple(reply)])


def adopt_shared() -> None:
    """Copy the replies in `SHARED` to the cache of this checkout. Raise InputError if the file is unreadable."""
    if not SHARED.is_file():
        return
    try:
        rows = [(key, *astuple(Reply(*fields))) for key, fields in json.loads(SHARED.read_text()).items()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{SHARED}: not readable: {error}; restore it with `dvc checkout {SHARED}`") from error
    with _database() as database:
        database.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", rows)


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    """Open one short transaction. Concurrent threads and processes wait for each other."""
    path = FOLDER / "replies.sqlite"
    try:
        FOLDER.mkdir(exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, "
                "cut_off INTEGER NOT NULL, input_tokens INTEGER, output_tokens INTEGER)"
            )
            yield database
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"{path}: cannot save replies: {error}; make it writable or delete it") from error
