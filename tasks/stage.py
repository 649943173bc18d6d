"""What all stages share: how they start, how they fail, and where things lie."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

from dpo.errors import InputError

BASE = Path("models/base")
SFT = Path("models/sft")
PREFERENCES = Path("data/preferences.parquet")
QUARANTINE = Path("data/quarantine.parquet")
TRAIN = Path("data/train.parquet")
EVAL = Path("data/eval.parquet")
REFERENCE_TRAIN = Path("reference/train")
REFERENCE_EVAL = Path("reference/eval")
REFERENCE_PROGRESS = Path(".reference-progress")
REFERENCE_SAMPLES = Path("samples/reference.parquet")
METRICS = Path("metrics")
COMPARISON = METRICS / "comparison.json"
PROFILE = METRICS / "profile.json"
REPORTS = Path("reports")
REPORT = REPORTS / "index.html"


def policy_folder(beta: str) -> Path:
    """The checkpoint of one beta, written as in params.yaml."""
    return Path("models") / f"dpo-{beta}"


def policy_samples(beta: str) -> Path:
    """The answers of one beta's policy."""
    return Path("samples") / f"dpo-{beta}.parquet"


def train_log(beta: str) -> Path:
    """The step log of one beta's training."""
    return METRICS / "train" / f"{beta}.csv"


def evaluation(beta: str) -> Path:
    """The held-out metrics of one beta's policy."""
    return METRICS / "evaluate" / f"{beta}.json"


def run(main: Callable[[], None]) -> None:
    """Run a stage; bad input ends it with the message alone, without a traceback, and exit code 2."""
    gc.freeze()  # what the imports made stays: no later collection looks at it again
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def beta_argument() -> str:
    """The stage's only argument, the beta as written in params.yaml."""
    if len(sys.argv) != 2:
        raise InputError(f"usage: python -m {Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem} BETA")
    return sys.argv[1]
