"""What all stages share: how they start, how they fail, and where things lie."""

import errno
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dpo.config import Cell, Params, load_params
from dpo.errors import InputError, Stopped

BASE = Path("models/base")
SFT = Path("models/sft")
PREFERENCES = Path("data/preferences.parquet")
QUARANTINE = Path("data/quarantine.parquet")
TRAIN = Path("data/train.parquet")
EVAL = Path("data/eval.parquet")
REFERENCE_TRAIN = Path("reference/train")
REFERENCE_EVAL = Path("reference/eval")
REFERENCE_PROGRESS = Path(".reference-progress")
TRAINING_PROGRESS = Path(".training-progress")
REFERENCE_SAMPLES = Path("samples/reference.parquet")
SAMPLES = Path("samples")
MARGINS = Path("margins")
METRICS = Path("metrics")
COMPARISON = METRICS / "comparison.json"
MLFLOW_STORE = "sqlite:///mlflow.db"
PROFILE = METRICS / "profile.json"
REPORTS = Path("reports")
REPORT = REPORTS / "index.html"


def policy_folder(cell: Cell) -> Path:
    """The checkpoint of a cell."""
    return Path("models") / cell.key


def model_card(cell: Cell) -> Path:
    """The description beside the checkpoint."""
    return Path("models") / f"{cell.key}.md"


def train_log(cell: Cell) -> Path:
    """The step log of a cell's training."""
    return METRICS / "train" / f"{cell.key}.csv"


def evaluation(cell: Cell) -> Path:
    """The held-out metrics of a cell's policy."""
    return METRICS / "evaluate" / f"{cell.key}.json"


def policy_samples(cell: Cell) -> Path:
    """The answers of a cell's policy."""
    return SAMPLES / f"{cell.key}.parquet"


def policy_margins(cell: Cell) -> Path:
    """Rewards and margin of every held-out pair under a cell's policy."""
    return MARGINS / f"{cell.key}.parquet"


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[[], None]) -> None:
    """Run a stage; what is the user's to mend ends it with the message alone, without a traceback.

    Exit codes: 2 for bad input, 1 where nothing can be written or a number is none, 143 when SIGTERM stopped it.
    """
    gc.freeze()  # what the imports made stays: no later collection looks at it again
    try:
        main()
    except InputError as error:
        _end(f"error: {error}", 2)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _end(f"error: {error}; make room there or make it writable, and run again: nothing half-written stays", 1)
    except FloatingPointError as error:
        _end(f"error: {error}", 1)
    except Stopped as stopped:
        _end(f"{stopped}; run again to go on from there", 143)


def run_launched(main: Callable[[], None]) -> None:
    """`run`, in the processes that the accelerate configuration `run.launch` asks for."""

    def launch() -> None:
        config = load_params().run.launch if "LOCAL_RANK" not in os.environ else None
        if config is None:
            main()
            return
        stage = sys.modules["__main__"].__spec__
        assert stage is not None
        launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "-m", stage.name, *sys.argv[1:]]
        os.execv(sys.executable, [sys.executable, *launcher])

    run(launch)


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)  # noqa: T201
    sys.exit(code)


def cell_argument(params: Params) -> Cell:
    """The cell that the stage's only argument names."""
    cells = {cell.key: cell for cell in params.sweep.cells()}
    if len(sys.argv) != 2 or sys.argv[1] not in cells:
        name = f"{Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}"
        raise InputError(f"usage: python -m {name} CELL, one of {', '.join(cells)}; params.yaml: sweep names them")
    return cells[sys.argv[1]]
