"""The processes that `accelerate launch` starts for a stage, and how they divide its work."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from operator import itemgetter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def this_process() -> PartialState:
    """Return the rank, the number of processes and the device. The first call initializes the process group."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def shards_weights() -> bool:
    """Return whether the launch configuration shards weights (FSDP) over several processes."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" and this_process().num_processes > 1


def share(
    count: int, work: Callable[[list[int]], list[Any]], during: AbstractContextManager[None] | None = None
) -> list[Any]:
    """Apply `work` to the items 0..count-1, divided among the processes. Each process gets all results.

    The work is done inside the block `during`, which a process without items enters too.
    """
    state = this_process()
    mine = list(range(state.process_index, count, state.num_processes))
    with during or nullcontext():
        results = work(mine) if mine else []
    parts = gather_object(list(zip(mine, results, strict=True)))
    return [result for _, result in sorted(parts, key=itemgetter(0))]
