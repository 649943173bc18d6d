"""What a run of either side of a benchmark is, and how one is measured in a process of its own."""

import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest.mock import patch

import psutil
import torch

from benchmarks.cases import Case
from dpo.engine.packing import TokenRow

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What one run of one side gave; `values` are losses by step or log-probs by completion, warm-up included.

    `bare_gib` is resident before there is a model; of TRL, which loads it in its constructor, it is not known.
    """

    pairs_per_second: float
    peak_gib: float
    bare_gib: float
    matmul_flops: float
    values: list[float]


def close(
    case: Case, rows: Sequence[TokenRow], ends: Sequence[float], values: list[float], bare: float = math.nan
) -> Run:
    """Sum a run up.

    `ends` are times, the first at the end of the warm-up, the last at the end of the run; `bare` are bytes.
    """
    speed = (len(rows) - case.pairs_per_step) / (ends[-1] - ends[0])
    most = torch.cuda.max_memory_allocated() if case.gpu else peak()
    flops = matmul_flops(torch.bfloat16 if case.dtype == "bf16" else torch.float32, case.gpu)
    return Run(speed, most / 2**30, bare / 2**30, flops, values)


def summary(runs: Sequence[Run], tokens_per_pair: float, work: float, matmul: float) -> dict[str, Any]:
    """Medians of one side's repeats; `work` are operations a pair, `matmul` those a second of a matrix product."""
    speed = statistics.median(run.pairs_per_second for run in runs)
    return {
        "pairs_per_second": speed,
        "pairs_per_second_repeats": [run.pairs_per_second for run in runs],
        "peak_gib": statistics.median(run.peak_gib for run in runs),
        "utilisation": work * speed / matmul,
        "tokens_per_pair": tokens_per_pair,
    }


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Most bytes of this process that were in memory at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_flops(dtype: torch.dtype, gpu: bool = False) -> float:
    """FLOP/s of the fastest of some square matrix products, of a size that keeps the device busy."""
    size, device = (8192, "cuda") if gpu else (2048, "cpu")
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    times = []
    for _ in range(8):
        start = now()
        torch.mm(left, right)
        times.append(now() - start)
    return 2 * size**3 / min(times)


def now() -> float:
    """Seconds, read when a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alone(function: Callable[..., T], *args: Any, **environment: str) -> T:
    """`function(*args)` in a fresh process, with more in its environment than this one has."""
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
