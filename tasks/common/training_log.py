"""The entries of a training that are recorded. Their number stays small however long a training is."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from dpo.common.files import atomic_write


def is_recorded(entry: Mapping[str, float]) -> bool:
    """Return whether an entry of the training log is recorded, in MLflow and in `metrics/`.

    These are every step up to 999, every 10th up to 9,999, every 100th up to 99,999 and so on, and all validations
    and the last step: 2,800 of 100,000 steps.
    """
    step = int(entry["step"])
    return step % 10 ** max(0, len(str(step)) - 3) == 0 or "eval_loss" in entry


def write_training_log(path: Path, log: Iterable[Mapping[str, float]]) -> None:
    """Write the recorded entries of a training, and its last, as CSV."""
    *entries, last = log
    with atomic_write(path) as tmp:
        pd.DataFrame([*filter(is_recorded, entries), last]).to_csv(tmp, index=False)
