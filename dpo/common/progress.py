"""Progress bars whose state another process can read."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dpo.common.files import write_json

PROGRESS_FILE = "DPO_PROGRESS_FILE"
"""Environment variable with the path of the JSON file that bars write their state to."""
WRITE_SECONDS = 2.0
"""Shortest time between two writes of one bar."""


class progress(tqdm):
    """Show a tqdm bar and write its state to the file that `DPO_PROGRESS_FILE` names.

    Takes the arguments of tqdm. The file is written at the first update, then at most every `WRITE_SECONDS`, and
    when the bar is closed: `{"title": str, "done": int, "total": int | null, "elapsed_s": float,
    "remaining_s": float | null}`. Only the first of several processes writes it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        first = os.environ.get("RANK", "0") == "0"
        self._file = os.environ.get(PROGRESS_FILE) if first else None
        self._next_write = 0.0
        super().__init__(*args, **kwargs)

    def update(self, n: float = 1) -> bool | None:
        """Advance the bar by `n` steps."""
        shown: bool | None = super().update(n)
        if time.monotonic() >= self._next_write:
            self._write()
        return shown

    def close(self) -> None:
        """Write the last state and close the bar."""
        self._write()
        super().close()

    def _write(self) -> None:
        if self._file is None or self.disable:
            return
        state = self.format_dict
        rate = state["rate"] or (self.n / state["elapsed"] if state["elapsed"] else None)
        value = {
            "title": self.desc.removesuffix(": "),
            "done": self.n,
            "total": self.total,
            "elapsed_s": state["elapsed"],
            "remaining_s": (self.total - self.n) / rate if self.total and rate else None,
        }
        with suppress(OSError):  # progress is informative: the work continues without it
            write_json(Path(self._file), value)
        self._next_write = time.monotonic() + WRITE_SECONDS
