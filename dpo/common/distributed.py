"""The processes that `accelerate launch` starts for a stage, and how they divide its work."""

from collections.abc import Callable
from datetime import timedelta
from operator import itemgetter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def this_process() -> PartialState:
    """Return the rank, the number of processes and the device. The first call initializes the process group."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))


def share(count: int, work: Callable[[list[int]], list[Any]]) -> list[Any]:
    """Apply `work` to the items 0..count-1, divided among the processes. Each process gets all results."""
    state = this_process()
    mine = list(range(state.process_index, count, state.num_processes))
    parts = gather_object(list(zip(mine, work(mine) if mine else [], strict=True)))
    return [result for _, result in sorted(parts, key=itemgetter(0))]
