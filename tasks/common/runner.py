"""Run stages and commands, and end them with one message and an exit code if they fail."""

import errno
import gc
import os
import signal
import sys
from collections.abc import Callable

from dpo.common.errors import InputError, Stopped, TransientError
from dpo.config import Params, load_params
from dpo.training.settings import Trial
from tasks.common.addresses import without_credentials

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[[], None]) -> None:
    """Run a stage or a command. Errors that the user can fix end it with one message, without a traceback.

    Exit codes: 2 for bad input, 75 (EX_TEMPFAIL) for transient faults, 1 if a file cannot be written or a loss is
    not finite, 143 after SIGTERM, 141 if the reader of the output has closed the pipe.
    """
    gc.freeze()  # objects that imports created stay until the end: exclude them from garbage collection
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a closed pipe is noticed here, not at the interpreter's end
    except InputError as error:
        _exit(f"error: {error}", 2)
    except TransientError as error:
        _exit(f"error: {error}", os.EX_TEMPFAIL)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at its end
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        fix = "free disk space or allow writing, then run again. Incomplete files were removed"
        _exit(f"error: {error}; {fix}", 1)
    except FloatingPointError as error:
        _exit(f"error: {error}", 1)
    except Stopped as stopped:
        _exit(f"{stopped}; run again to resume", 143)


def check_store() -> None:
    """Connect to MLflow in the main process, so that a refusal ends the stage before its work."""
    from tasks.tracking.offline import connect_or_offline  # imported here because MLflow starts slowly

    if os.environ.get("RANK", "0") == "0":
        connect_or_offline()


def run_launched(main: Callable[[], None]) -> None:
    """Run a stage with `run`, in the processes that the accelerate configuration `run.launch` specifies."""

    def launch_or_run() -> None:
        if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
            raise InputError(
                "run.launch: context, sequence and tensor parallelism are not supported; remove "
                "parallelism_config from this file. For longer pairs, set gradient_checkpointing: offload"
            )
        config = load_params().run.launch if "LOCAL_RANK" not in os.environ else None
        if config is not None:
            stage = sys.modules["__main__"].__spec__
            assert stage is not None
            launch = ["-m", "accelerate.commands.launch", "--config_file", config, "-m", stage.name, *sys.argv[1:]]
            os.execv(sys.executable, [sys.executable, *launch])  # does not return
        main()

    run(launch_or_run)


def _exit(message: str, code: int) -> None:
    print(without_credentials(message), file=sys.stderr)  # noqa: T201
    sys.exit(code)


def trial_argument(params: Params, *, of: Callable[[Trial], bool] = lambda trial: True) -> Trial:
    """Return the trial whose name is the stage's only argument, among those for which `of` is true."""
    trials = {trial.name: trial for trial in filter(of, params.trials())}
    if len(sys.argv) != 2 or sys.argv[1] not in trials:
        given = " ".join(sys.argv[1:])
        raise InputError(f"TRIAL: {given!r} is not a trial of params.yaml: sweep; use one of {', '.join(trials)}")
    return trials[sys.argv[1]]
