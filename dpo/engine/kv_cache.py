"""Keys and values of responses while they are generated."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KVCache:
    """Keys and values of R responses in every attention layer.

    Rows are padded on the left, so that all of them end at the same column. The layers call `fill` once, with the
    packed stream of the prompts, and `append` in each later pass, with one token per row.

    Attributes:
        width: number of filled columns.
        padding: number of empty columns of each row.
    """

    def __init__(self, positions: Sequence[Sequence[int]], new_tokens: int, device: torch.device) -> None:
        """Prepare for R prompts at these positions of a stream, and for `new_tokens` more tokens of each row."""
        self.width = max(map(len, positions))
        self.padding = [self.width - len(row) for row in positions]
        self._capacity = self.width + new_tokens
        padded = [[0] * padding + list(row) for padding, row in zip(self.padding, positions, strict=True)]
        self._columns = torch.tensor(padded, device=device)  # [R, width], positions in the stream
        self._layers: dict[nn.Module, Tensor] = {}  # [2, R, kv_heads, capacity, head_dim]: keys and values
        self._masks: dict[int, Tensor | None] = {}

    @property
    def next_positions(self) -> list[int]:
        """Position of the last column in each row."""
        return [self.width - 1 - padding for padding in self.padding]

    def fill(self, layer: nn.Module, key: Tensor, value: Tensor) -> None:
        """Copy the prompts' keys and values, each [1, kv_heads, T, head_dim], from the stream."""
        _, heads, _, size = key.shape
        buffer = key.new_empty(2, len(self.padding), heads, self._capacity, size)
        for part, stream in zip(buffer, (key, value), strict=True):
            part[:, :, : self.width] = stream[0][:, self._columns].transpose(0, 1)
        self._layers[layer] = buffer

    def add_column(self) -> None:
        """Begin a pass with one more token of each row."""
        self.width += 1
        self._masks = {}

    def append(
        self, layer: nn.Module, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the last column, [R, kv_heads, 1, head_dim] each, and return what its tokens attend to.

        Returns:
            Keys and values [R, kv_heads, W, head_dim] of the last W columns, at most `window`, and a mask
            [R, 1, 1, W] that is true for columns without padding, or None if there is no padding.
        """
        first = 0 if window is None else max(0, self.width - window)
        if first not in self._masks:
            columns, padding = torch.arange(first, self.width), torch.tensor(self.padding)
            mask = (columns >= padding[:, None])[:, None, None].to(key.device)
            self._masks[first] = mask if max(self.padding) > first else None
        buffer = self._layers[layer]
        buffer[0, :, :, self.width - 1 : self.width] = key
        buffer[1, :, :, self.width - 1 : self.width] = value
        keys, values = buffer[:, :, :, first : self.width]
        return keys, values, self._masks[first]

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Keep only some rows. Return them in their new order: the last ones fill the gaps, so that few move."""
        order = list(range(len(rows)))
        gaps, moved = sorted({*order} - {*rows}), [row for row in rows if row >= len(rows)]
        for gap, row in zip(gaps, moved, strict=True):
            order[gap] = row
        for layer, buffer in self._layers.items():
            if gaps:
                buffer[:, gaps, :, : self.width] = buffer[:, moved, :, : self.width]
            self._layers[layer] = buffer[:, : len(rows)]
        self.padding = [self.padding[row] for row in order]
        return order
