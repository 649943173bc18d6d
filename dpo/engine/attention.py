"""Attention over a packed stream: each completion sees its prompt and itself, nothing else."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from dpo.engine.packing import Layout

PACKED_ATTENTION = "dpo_packed"
"""Name under which transformers finds this attention."""

MAX_HEAD_DIM = 256
"""Largest head dimension that variable-length attention supports. It must also be a multiple of 8."""

variable_length_attention: Callable[..., Any] = varlen_attn
if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 always supports grouped queries
    variable_length_attention = functools.partial(varlen_attn, enable_gqa=True)


class VarlenMetadata(NamedTuple):
    """A layout for variable-length attention: S sequences of queries. Sequence s attends to K_s keys.

    The last query and the last key of a sequence are the same position.
    """

    cu_seqlens_q: Tensor
    """int32 [S + 1], cumulative number of queries."""
    cu_seqlens_k: Tensor
    """int32 [S + 1], cumulative number of keys."""
    key_positions: Tensor
    """int64 [sum of K_s], stream positions of the keys."""
    max_seqlen_q: int
    max_seqlen_k: int


def varlen_metadata(layout: Layout, device: torch.device) -> VarlenMetadata:
    """Convert a layout: prompt and first completion are one sequence, each further completion is another one."""
    queries: list[int] = []
    keys: list[int] = []
    positions: list[Tensor] = []
    start = 0
    for prompt, (first, *others) in layout:
        end = start + prompt + first
        queries.append(prompt + first)
        keys.append(prompt + first)
        positions.append(torch.arange(start, end))
        for length in others:
            queries.append(length)
            keys.append(prompt + length)
            positions += [torch.arange(start, start + prompt), torch.arange(end, end + length)]
            end += length
        start = end
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device) for lengths in (queries, keys)
    )
    return VarlenMetadata(cu_seqlens_q, cu_seqlens_k, torch.cat(positions).to(device), max(queries), max(keys))


def supports_varlen(model: PreTrainedModel) -> bool:
    """Return whether variable-length attention supports the head dimension of a model."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | VarlenMetadata,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention for each row; further completions attend to the prompt and to themselves.

    The shapes are query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim], output [1, T, heads,
    head_dim]. `VarlenMetadata` selects variable-length attention in bf16. Dropout is never applied, because
    log-probs must be deterministic.
    """
    if isinstance(layout, VarlenMetadata):
        return _varlen_attention(query, key, value, layout, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # split, not slice: the backward pass of a slice writes zeros to a copy of the stream for each row.
    lengths = [n for prompt, (first, *others) in layout for n in (prompt + first, *others)]
    queries, keys, values = (iter(t.split(lengths, 2)) for t in (query, key, value))
    attend = functools.partial(_causal_attention, scaling=scaling, window=sliding_window)
    outputs = []
    for prompt, (_, *others) in layout:
        first_key, first_value = next(keys), next(values)
        outputs.append(attend(next(queries), first_key, first_value))
        if others:
            prompt_key, prompt_value = first_key[:, :, :prompt], first_value[:, :, :prompt]
        for _ in others:
            own_key = torch.cat([prompt_key, next(keys)], 2)
            own_value = torch.cat([prompt_value, next(values)], 2)
            outputs.append(attend(next(queries), own_key, own_value))
    return torch.cat(outputs, 2).transpose(1, 2), None


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, metadata: VarlenMetadata, scaling: float | None, window: int | None
) -> Tensor:
    """Compute all rows with one bf16 kernel, which skips queries and keys that do not see each other."""
    flat_query, flat_key, flat_value = (t[0].transpose(0, 1).to(torch.bfloat16) for t in (query, key, value))
    output: Tensor = variable_length_attention(
        flat_query,
        flat_key.index_select(0, metadata.key_positions),
        flat_value.index_select(0, metadata.key_positions),
        metadata.cu_seqlens_q,
        metadata.cu_seqlens_k,
        metadata.max_seqlen_q,
        metadata.max_seqlen_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return output[None]


def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None
) -> Tensor:
    """Compute causal attention of Q queries to K keys; the queries are the last Q of the K positions."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or keys <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if window is not None:
        mask = mask.triu(keys - queries - window + 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
