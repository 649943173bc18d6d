"""Optimizer steps with an exact number of rows, in micro-batches under a token budget."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np


def balance(indices: Sequence[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Distribute indices over at most `bins` groups of nearly equal token counts.

    The longest row comes first, and each row goes to the group with the fewest tokens.
    """
    groups: list[list[int]] = [[] for _ in range(min(bins, len(indices)))]
    loads = [0] * len(groups)
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        lightest = loads.index(min(loads))
        groups[lightest].append(index)
        loads[lightest] += lengths[index]
    return groups


@dataclass
class StepSampler:
    """Sampler with an exact number of rows per step and micro-batches under a token budget.

    Each epoch is a seeded shuffle that is cut into optimizer steps of `rows_per_step` rows. The last step may have
    fewer rows. Every full step has the same number of micro-batches per process, `accumulation`: the smallest
    number for which every micro-batch of every epoch fits in `max_tokens_per_microbatch`, or one row per
    micro-batch if a single row exceeds the budget. All processes get the same number of micro-batches. If a short
    step leaves a process without rows, its micro-batch is empty.
    """

    lengths: Sequence[int]
    _: KW_ONLY
    rows_per_step: int
    max_tokens_per_microbatch: int
    epochs: int
    seed: int
    processes: int = 1
    process: int = 0

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("no rows to train on")
        self.rows_per_step = min(self.rows_per_step, len(self.lengths))
        steps = [step for epoch in range(self.epochs) for step in self._steps(epoch)]
        self.accumulation = 1
        while self.accumulation * self.processes < self.rows_per_step and any(
            sum(self.lengths[i] for i in group) > self.max_tokens_per_microbatch
            for step in steps
            for group in balance(step, self.lengths, self.accumulation * self.processes)
        ):
            self.accumulation += 1

    def _steps(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths)).tolist()
        return [order[i : i + self.rows_per_step] for i in range(0, len(order), self.rows_per_step)]

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """Return the row numbers of this process's micro-batches, for each optimizer step of an epoch."""
        steps = []
        for step in self._steps(epoch):
            groups = balance(step, self.lengths, self.accumulation * self.processes)
            groups += [[]] * (-len(groups) % self.processes)
            steps.append(groups[self.process :: self.processes])
        return steps
