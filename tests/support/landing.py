"""New files for retrainings."""

from pathlib import Path

import pandas as pd
import pytest


def pairs(first: int, count: int = 4) -> pd.DataFrame:
    numbers = range(first, first + count)
    return pd.DataFrame(
        {
            "prompt": [f"What of book {number}?" for number in numbers],
            "chosen": [f"Book {number}, with its {number + 7} pages, is a treasure." for number in numbers],
            "rejected": [f"Nobody should read book {number} or its {number + 7} pages." for number in numbers],
            "split": ["train"] * count,
        }
    )


def land(landing: Path, name: str, first: int) -> None:
    pairs(first).to_json(landing / name, orient="records", lines=True)


def set_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "t")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "t@example.org")
