"""How stages and commands start and fail."""

import errno
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dpo.common.errors import InputError, Stopped, TransientError
from dpo.config import Params, load_params
from dpo.training.settings import Trial

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[[], None]) -> None:
    """Run a stage; what is the user's to mend ends it with the message alone, without a traceback.

    Exit codes: 2 for bad input, 75 (EX_TEMPFAIL) for transient faults, 1 if nothing can be written or a loss is
    not finite, 143 if SIGTERM stopped it.
    """
    gc.freeze()  # what the imports made stays: no later collection looks at it again
    try:
        main()
    except InputError as error:
        _end(f"error: {error}", 2)
    except TransientError as error:
        _end(f"error: {error}", os.EX_TEMPFAIL)
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


def trial_argument(params: Params) -> Trial:
    """The trial that the stage's only argument names."""
    trials = {trial.name: trial for trial in params.sweep.trials()}
    if len(sys.argv) != 2 or sys.argv[1] not in trials:
        name = f"{Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}"
        raise InputError(
            f"usage: python -m {name} TRIAL, one of {', '.join(trials)}; params.yaml: sweep names them"
        )
    return trials[sys.argv[1]]
