"""Keys and values of responses in the data type of the attention that computed the prompts."""

import torch
from torch import nn

from dpo.engine import attention
from dpo.engine.kv_cache import KVCache

PROMPTS, HEADS, KV_HEADS, SIZE = [[0, 1, 2], [3, 4]], 4, 2, 8


def test_variable_length_attention_keeps_keys_and_values_in_bf16(monkeypatch):
    monkeypatch.setattr(attention, "variable_length_attention", lambda query, *args, **kwargs: query)
    torch.manual_seed(0)
    query = torch.randn(1, HEADS, 5, SIZE)
    key, value = torch.randn(2, 1, KV_HEADS, 5, SIZE)
    layout = attention.varlen_metadata([(2, [1]), (1, [1])], query.device)
    layer, cache = nn.Identity(), KVCache(PROMPTS, 1, query.device)
    attention.packed_attention(layer, query, key, value, None, layout=layout, cache=cache)

    cache.add_column()
    new_query = torch.randn(2, HEADS, 1, SIZE)
    new_key, new_value = torch.randn(2, 2, KV_HEADS, 1, SIZE)
    output, _ = attention.packed_attention(layer, new_query, new_key, new_value, None, layout=None, cache=cache)

    assert output.dtype == torch.bfloat16
    for row, columns in enumerate(PROMPTS):
        keys, values = (
            torch.cat([old[0, :, columns], new[row]], 1).repeat_interleave(HEADS // KV_HEADS, 0).double()
            for old, new in ((key, new_key), (value, new_value))
        )
        weights = (new_query[row].double() @ keys.transpose(1, 2) / SIZE**0.5).softmax(2)
        torch.testing.assert_close(output[row, 0].double(), (weights @ values)[:, 0], rtol=0.02, atol=0.02)
