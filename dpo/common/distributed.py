"""The processes that `accelerate launch` starts for one stage, and how they share its work."""

from collections.abc import Callable
from datetime import timedelta
from operator import itemgetter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

LONGEST_WAIT = timedelta(days=1)
"""How long a process that has done its share waits for the others."""


def this_process() -> PartialState:
    """Which of how many processes this is, and its device; the first call in a process joins it to the others."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)


def share(count: int, work: Callable[[list[int]], list[Any]]) -> list[Any]:
    """Results of `work` for the items 0..count-1, each process doing a part; all of them, in order, in each."""
    state = this_process()
    mine = list(range(state.process_index, count, state.num_processes))
    results = work(mine) if mine else []
    parts = gather_object(list(zip(mine, results, strict=True)))
    return [result for _, result in sorted(parts, key=itemgetter(0))]
