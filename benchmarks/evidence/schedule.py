"""Run cases in processes, several at once, each after what the cases of its seed share."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.plan import Case
from benchmarks.measure import alone
from dpo.common.errors import Stopped, TransientError

Seed = tuple[str, int]
Submit = Callable[..., Future[Any]]
MACHINE_FAULTS = (TransientError, Stopped, OSError, MemoryError, torch.OutOfMemoryError, BrokenProcessPool)
"""Faults that say nothing about the method of a case."""


def seed_of(case: Case) -> Seed:
    """Return task and seed: the cases that share data, reference and reward model."""
    return case.task, case.seed


@contextmanager
def workers(jobs: int) -> Iterator[Submit]:
    """Yield a function that starts a call in another process, `jobs` of them at once.

    On a CPU each call has a process of its own, whose peak memory is that of the call. On a GPU, where the peak
    can be reset, the processes are kept: to start one takes as long as a case.
    """
    if torch.cuda.is_available():
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as processes:
            yield processes.submit
    else:
        with ThreadPoolExecutor(jobs) as threads:
            yield lambda function, *args: threads.submit(alone, function, *args)


def run_all(
    left: list[Case], cache: Path, jobs: int, may_start: Callable[[Case, bool], bool],
    record: Callable[[Case, dict[str, Any], float], None],
) -> None:  # fmt: skip
    """Run cases, in their order where their seeds allow it, and remove those that have run from `left`.

    `may_start` tells whether there is time for a case, whose shared products may have to be built before. `record`
    receives the result of a case, or its error, with the seconds that these products took. After a fault of the
    machine no case starts, and the fault is raised when the running ones have ended.

    Raises:
        InputError: what the cases of a seed share cannot be built, for example because TRL is not installed.
        TransientError: the data or the model cannot be downloaded.
        Stopped: SIGTERM was received. The next run resumes the case.
        OSError, MemoryError, torch.OutOfMemoryError, BrokenProcessPool: the machine lacks disk space or memory.
    """
    from benchmarks.evidence.cases import measure
    from benchmarks.evidence.products import build

    built, faults = dict[Seed, float](), list[Exception]()
    running = dict[Future[Any], Case | Seed]()
    with workers(jobs) as submit:
        while True:
            while not faults and len(running) < jobs:
                waiting = [each for each in left if each not in running.values()]
                case = next((each for each in waiting if seed_of(each) not in running.values()), None)
                if case is None or not may_start(case, seed_of(case) in built):
                    break
                if (seed := seed_of(case)) in built:
                    running[submit(measure, case, cache)] = case
                else:
                    running[submit(build, [each for each in waiting if seed_of(each) == seed], cache)] = seed
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                part = running.pop(future)
                try:
                    if isinstance(part, Case):
                        facts = result(future)
                        left.remove(part)
                        record(part, facts, built[seed_of(part)])
                    else:
                        built[part] = future.result()
                except Exception as error:  # noqa: BLE001 - it is raised after the cases that run
                    faults.append(error)
    for fault in faults:
        raise fault


def result(future: Future[Any]) -> dict[str, Any]:
    """Return the result of a case, or the error of its method."""
    try:
        return dict(future.result())
    except MACHINE_FAULTS:
        raise
    except Exception as error:  # noqa: BLE001 - a failed run is a result of the method
        return {"error": f"{type(error).__name__}: {error}"}
