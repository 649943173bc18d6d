"""Packing of token rows into one flat stream of tokens without padding.

A row is a prompt with its completions (two for a preference pair). In the stream, the prompt appears once and its
completions follow it:

    row 0: [prompt | completion 0 | completion 1]  row 1: [prompt | completion 0 | completion 1] ...

The positions of each completion continue from its prompt. Linear layers do no work for padding. Each completion
attends only to its prompt and itself (`dpo.engine.attention`).
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.engine.tokenization import TokenRow, Tokens

Layout = tuple[tuple[int, tuple[int, ...]], ...]
"""The prompt length and the completion lengths of each row."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """R rows as one stream of T tokens, N of which are scored, with C completions."""

    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T], from 0 for each prompt. Every completion continues from its prompt."""
    layout: Layout
    logit_positions: Tensor
    """[N], stream positions whose hidden states predict the scored tokens."""
    targets: Tensor
    """[N], the scored tokens."""
    completion_index: Tensor
    """[N], completion of each token, 0 to C - 1."""
    ids: tuple[str, ...]
    """The R row ids."""

    @property
    def completions(self) -> int:
        """The number of completions, C."""
        return sum(len(lengths) for _, lengths in self.layout)

    @property
    def lengths(self) -> Tensor:
        """The number of scored tokens of each completion, int64 [C]."""
        return torch.bincount(self.completion_index, minlength=self.completions)

    def sum_per_completion(self, values: Tensor) -> Tensor:
        """Return the sums [C] of values [N] per completion token."""
        return torch.zeros(self.completions, device=values.device).index_add(0, self.completion_index, values)

    def to(self, device: torch.device) -> "PackedBatch":
        """Return a copy with all tensors on `device`."""
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)


def pack(rows: Sequence[TokenRow]) -> PackedBatch:
    """Lay rows out in one stream.

    Raises:
        ValueError: a prompt or a completion is empty. The last prompt token predicts the first completion token.
    """
    input_ids: list[Tokens] = []
    position_ids: list[np.ndarray] = []
    logit_positions: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    end = 0
    for row in rows:
        length = len(row.prompt)
        if not length or not all(row.lengths):
            raise ValueError(f"row {row.id!r}: the prompt and every completion need at least one token")
        input_ids.append(row.prompt)
        position_ids.append(np.arange(length))
        end += length
        last = end - 1  # of the prompt, predicts the first token of every completion
        for completion, context in itertools.zip_longest(row.completions, row.context, fillvalue=()):
            places = np.arange(len(completion))
            scored = np.delete(places, context) if len(context) else places
            logit_positions.append(np.where(scored, end + scored - 1, last))
            targets.append(np.asarray(completion)[scored])
            input_ids.append(completion)
            position_ids.append(length + places)
            end += len(completion)
    return PackedBatch(
        input_ids=_tensor(input_ids)[None],
        position_ids=_tensor(position_ids)[None],
        layout=tuple((len(row.prompt), tuple(map(len, row.completions))) for row in rows),
        logit_positions=_tensor(logit_positions),
        targets=_tensor(targets),
        completion_index=torch.arange(len(targets)).repeat_interleave(torch.tensor([*map(len, targets)])),
        ids=tuple(row.id for row in rows),
    )


def _tensor(parts: Sequence[Tokens]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def pack_prompts(prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int], Layout, list[list[int]]]:
    """Lay prompts out in one stream. Equal prompts, and the start that all of them have in common, appear once.

    Returns:
        Token ids and position ids of the stream, its layout, and the place in the stream of each prompt's tokens.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    longest = min(map(len, distinct)) - 1  # every prompt keeps its last token
    start = commonprefix([prompt[:longest] for prompt in distinct])  # noqa: RUF071
    shared, input_ids, position_ids = len(start), list(start), list(range(len(start)))
    places = {}
    for prompt in distinct:
        places[prompt] = [*range(shared), *range(len(input_ids), len(input_ids) + len(prompt) - shared)]
        input_ids += prompt[shared:]
        position_ids += range(shared, len(prompt))
    lengths = tuple(len(prompt) - shared for prompt in distinct)
    layout: Layout = ((shared, lengths),) if shared else tuple((length, (0,)) for length in lengths)
    return input_ids, position_ids, layout, [places[tuple(prompt)] for prompt in prompts]


def budget_batches(lengths: Sequence[int], max_tokens_per_microbatch: int) -> list[list[int]]:
    """Split 0..n-1 in order into batches of at most `max_tokens_per_microbatch` tokens.

    A row that is longer than the budget gets its own batch.
    """
    batches: list[list[int]] = []
    total = 0
    for index, length in enumerate(lengths):
        if not batches or total + length > max_tokens_per_microbatch:
            batches.append([])
            total = 0
        batches[-1].append(index)
        total += length
    return batches
