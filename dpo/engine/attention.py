"""Attention over a packed stream: each completion sees its prompt and itself, nothing else."""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from dpo.engine.kv_cache import KVCache
from dpo.engine.packing import Layout

PACKED_ATTENTION = "dpo_packed"
"""Name under which transformers finds this attention."""

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
    positions: list[int] = []
    start = 0
    for prompt, (first, *others) in layout:
        end = start + prompt + first
        queries += [prompt + first, *others]
        keys += [prompt + first, *(prompt + length for length in others)]
        positions += range(start, end)
        for length in others:
            positions += [*range(start, start + prompt), *range(end, end + length)]
            end += length
        start = end
    q, k = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32).to(device) for n in (queries, keys))
    return VarlenMetadata(q, k, torch.tensor(positions).to(device), max(queries), max(keys))


def supports_varlen(model: PreTrainedModel) -> bool:
    """Return whether variable-length attention supports the head dimension of a model."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim % 8 == 0 and head_dim <= 256


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | VarlenMetadata | None,
    cache: KVCache | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention for each row; further completions attend to the prompt and to themselves.

    The shapes are query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim], output [1, T, heads,
    head_dim]. `VarlenMetadata` selects variable-length attention in bf16. Dropout is never applied, because
    log-probs must be deterministic.

    A `cache` keeps keys and values for generation. Without a layout, its R rows have one new token each: query
    [R, heads, 1, head_dim], key and value [R, kv_heads, 1, head_dim], output [R, 1, heads, head_dim]. The
    cache has the data type in which the prompts were computed.
    """
    if layout is None:
        assert cache is not None
        keys, values, mask = cache.append(module, key, value, sliding_window)
        # Heads that share keys become queries of one head, so that keys are not repeated.
        grouped = query.view(len(query), keys.shape[1], -1, query.shape[3]).to(keys.dtype)
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
        return output.reshape(len(query), 1, query.shape[1], -1), None
    if isinstance(layout, VarlenMetadata):
        query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
    if cache is not None:
        cache.fill(module, key, value)
    if isinstance(layout, VarlenMetadata):
        # One bf16 kernel computes all rows and skips queries and keys that do not see each other.
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        key, value = (t.index_select(0, layout.key_positions) for t in (key, value))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        lengths = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k)
        output = variable_length_attention(query, key, value, *lengths, scale=scaling, window_size=window)
        return output[None], None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # split, not slice: the backward pass of a slice writes zeros to a copy of the stream for each row.
    sizes = [n for prompt, (first, *others) in layout for n in (prompt + first, *others)]
    parts = zip(*(t.split(sizes, 2) for t in (query, key, value)), strict=True)
    outputs = []
    for prompt, (_, *others) in layout:
        first_query, first_key, first_value = next(parts)
        outputs.append(_causal_attention(first_query, first_key, first_value, scaling, sliding_window))
        prompt_key, prompt_value = first_key[:, :, :prompt], first_value[:, :, :prompt]
        for own_query, own_key, own_value in itertools.islice(parts, len(others)):
            keys, values = torch.cat([prompt_key, own_key], 2), torch.cat([prompt_value, own_value], 2)
            outputs.append(_causal_attention(own_query, keys, values, scaling, sliding_window))
    return torch.cat(outputs, 2).transpose(1, 2), None


def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
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
