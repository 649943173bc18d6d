"""Measure one run of either side of a benchmark in its own process."""

import math
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest.mock import patch

import psutil
import torch

from benchmarks.cases import Case
from dpo.engine.tokenization import TokenRow

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One run of one side. `values` are losses per step or log-probs per completion, including the warm-up.

    `bare_gib` is resident before the model is loaded; it is NaN for TRL, whose constructor loads the model.
    """

    pairs_per_second: float
    peak_gib: float
    bare_gib: float
    matmul_flops: float
    values: list[float]


def close(
    case: Case, rows: Sequence[TokenRow], ends: Sequence[float], values: list[float], bare: float = math.nan
) -> Run:
    """Return the measurements of a run.

    Args:
        case: the case.
        rows: all pairs, including the warm-up.
        ends: times in seconds; the first is the end of the warm-up, the last the end of the run.
        values: losses per step or log-probs per completion.
        bare: bytes resident before the model was loaded.
    """
    speed = (len(rows) - case.warm_up(rows)) / (ends[-1] - ends[0])
    memory = torch.cuda.max_memory_allocated() if case.gpu else peak()
    flops = matmul_flops(torch.bfloat16 if case.dtype == "bf16" else torch.float32, case.gpu)
    return Run(speed, memory / 2**30, bare / 2**30, flops, values)


def reset_peak() -> None:
    """Forget the GPU's peak memory so far, such as that of the creation of random weights."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def summary(runs: Sequence[Run], tokens_per_pair: float, work: float, matmul: float) -> dict[str, Any]:
    """Return the medians of one side's runs; `work` is FLOPs per pair, `matmul` the FLOP/s of a matrix product."""
    speed = statistics.median(run.pairs_per_second for run in runs)
    return {
        "pairs_per_second": speed,
        "pairs_per_second_repeats": [run.pairs_per_second for run in runs],
        "peak_gib": statistics.median(run.peak_gib for run in runs),
        "utilisation": work * speed / matmul,
        "tokens_per_pair": tokens_per_pair,
    }


@contextmanager
def maxima(read: Callable[[], list[float]]) -> Iterator[list[float]]:
    """Call `read` every 20 ms inside the block, and at its end; yield the maximum of each value so far."""
    found, done = read(), threading.Event()

    def update() -> None:
        found[:] = map(max, found, read())

    def watch() -> None:
        while not done.wait(0.02):
            update()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        update()


def resident() -> int:
    """Return the resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Return the peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_flops(dtype: torch.dtype, gpu: bool = False) -> float:
    """Return the FLOP/s of the fastest of eight square matrix products that are large enough for the device."""
    size, device = (8192, "cuda") if gpu else (2048, "cpu")
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(8):
        start = now()
        torch.mm(left, right)
        times.append(now() - start)
    return 2 * size**3 / min(times)


def now() -> float:
    """Return a time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alone(function: Callable[..., T], *args: Any, **environment: str) -> T:
    """Return `function(*args)` from a new process with these variables added to its environment."""
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
