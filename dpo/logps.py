"""The log-prob engine: one way to compute log pi(y|x), for the reference cache, training and evaluation alike.

It runs the transformer on the packed stream of `dpo.batching` (no pads, each prompt once), projects to the
vocabulary only where a completion token is predicted, in chunks that are recomputed in the backward pass, and
takes the log-sum-exp in fp32. The full [tokens, vocabulary] matrix never exists.
"""

import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from dpo.batching import TokenRow, budget_batches, pack

ENGINE_VERSION = 1
"""Part of every reference cache's key; raise it whenever the numbers below could change."""

PACKED_ATTENTION = "dpo_packed"
HEAD_CHUNK = 256
"""Positions projected to the vocabulary at a time: 50 MB of fp32 logits at a vocabulary of 49,152."""

Layout = list[tuple[int, tuple[int, ...], tuple[Tensor, ...]]]
"""Each row's prompt length, completion lengths, and the masks of all completions but the first."""


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention row by row: prompt and first completion causally, each further completion on prompt and itself.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]; returns [1, T, heads, head_dim].
    Dropout is never applied: log-probs must not be random.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # split, not slice: the backward pass of a slice fills a whole stream with zeros for each row.
    rows = [
        t.split([prompt + sum(completions) for prompt, completions, _ in layout], 2) for t in (query, key, value)
    ]
    outputs = []
    for q, k, v, (prompt, completions, masks) in zip(*rows, layout, strict=True):
        end = prompt + completions[0]
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, :end], k[:, :, :end], v[:, :, :end], is_causal=True, scale=scaling
            )
        )
        for length, mask in zip(completions[1:], masks, strict=True):
            own = slice(end, end + length)
            outputs.append(
                F.scaled_dot_product_attention(
                    q[:, :, own],
                    torch.cat([k[:, :, :prompt], k[:, :, own]], 2),
                    torch.cat([v[:, :, :prompt], v[:, :, own]], 2),
                    attn_mask=mask,
                    scale=scaling,
                )
            )
            end += length
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


def _layout(spans: Sequence[tuple[int, tuple[int, ...]]], device: torch.device) -> Layout:
    return [
        (
            prompt,
            completions,
            tuple(
                torch.ones(length, prompt + length, dtype=torch.bool, device=device).tril(prompt)
                for length in completions[1:]
            ),
        )
        for prompt, completions in spans
    ]


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target] by chunks; the backward pass computes each chunk anew."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            logits = F.linear(hidden[part], weight, bias).float()
            logps[part] = logits.gather(1, targets[part, None])[:, 0] - logits.logsumexp(1)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(targets), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            grad_logits = F.linear(hidden[part], weight, bias).float().softmax(1).neg_()
            grad_logits[torch.arange(len(grad_logits), device=hidden.device), targets[part]] += 1
            grad_logits = grad_logits.mul_(grads[0][part, None]).to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return grad_hidden, grad_weight, grad_bias, None


def _forward(self: PreTrainedModel, *args: Any, packed: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Forward of a causal language model that also answers `model(packed=pack(rows))` with log-probs [C]."""
    if packed is None:
        return type(self).forward(self, *args, **kwargs)
    input_ids = packed["input_ids"]
    hidden = self.get_decoder()(
        input_ids=input_ids,
        position_ids=packed["position_ids"],
        layout=_layout(packed["spans"], input_ids.device),
        use_cache=False,
    ).last_hidden_state[0]
    head = self.get_output_embeddings()
    hidden = hidden.index_select(0, packed["predict_from"]).to(head.weight.dtype)
    token_logps = _TokenLogps.apply(hidden, head.weight, getattr(head, "bias", None), packed["targets"])
    completions = sum(len(lengths) for _, lengths in packed["spans"])
    return torch.zeros(completions, device=input_ids.device).index_add(0, packed["owner"], token_logps)


def load_model(path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal language model ready for `model(packed=...)`, dropout off, in eval mode.

    Args:
        path: a local folder with safetensors weights.
        dtype: the dtype of the weights.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.forward = types.MethodType(_forward, model)
    model.set_attn_implementation(PACKED_ATTENTION)
    return model.eval()


@torch.inference_mode()
def sequence_logps(
    model: PreTrainedModel, rows: Sequence[TokenRow], tokens_per_batch: int, title: str = "log-probs"
) -> Tensor:
    """log pi(y|x) of every completion, summed over its tokens, in nats.

    Args:
        model: from `load_model`.
        rows: R rows with the same number of completions K.
        tokens_per_batch: most tokens in one forward pass.
        title: label of the progress bar.

    Returns:
        fp32 on the CPU, shape [R, K].
    """
    model.set_attn_implementation(PACKED_ATTENTION)
    parts = []
    with tqdm(total=len(rows), desc=title, unit="row", mininterval=2) as bar:
        for batch in budget_batches([row.tokens for row in rows], tokens_per_batch):
            packed = pack([rows[i] for i in batch])
            moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in packed.items()}
            parts.append(model(packed=moved).cpu())
            bar.update(len(batch))
    return torch.cat(parts).view(len(rows), -1)
