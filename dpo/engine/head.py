"""Projection to the vocabulary in chunks, so that the full [tokens, vocabulary] matrix never exists."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.engine.products import linear
from dpo.engine.settings import GPU_HEAD_CHUNK, HEAD_CHUNK, VOCABULARY_PART


def project(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Return fp32 logits [n, vocabulary] of hidden states [n, width]."""
    return _project(hidden, head.weight, head.bias)


def token_logps(hidden: Tensor, head: nn.Linear, targets: Tensor, *, accumulate_in_place: bool) -> Tensor:
    """Return log softmax(head(hidden))[target] in fp32, shape [N], of hidden [N, width] and token ids [N].

    With `accumulate_in_place`, the backward pass adds the gradient of a trained weight directly to `weight.grad`.
    """
    if any(weight.requires_grad for weight in head.parameters()):
        return _TokenLogps.apply(hidden, head.weight, head.bias, targets, accumulate_in_place)
    return _FrozenHeadLogps.apply(hidden, head.weight, head.bias, targets)


def chunked_logits(hidden: Tensor, head: nn.Linear) -> Iterator[Tensor]:
    """Yield fp32 logits [n, vocabulary] in chunks of `HEAD_CHUNK` rows of `hidden`."""
    for chunk in hidden.split(HEAD_CHUNK):
        yield project(chunk, head)


class _TokenLogps(torch.autograd.Function):
    """Log-probs of a trained head. The backward pass recomputes all chunks except the last, which is kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, in_place: bool
    ) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        ctx.leaf = weight if in_place else None  # hooks of saved tensors may replace the saved weight
        for part in _chunks(targets):
            ctx.kept = None  # free the previous chunk first
            *ctx.kept, logps[part] = _exp_logits(hidden[part], weight, bias, targets[part])
        ctx.save_for_backward(hidden, weight, bias, targets)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None if ctx.leaf is None else ctx.leaf.grad
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for part in reversed(_chunks(targets)):
            kept, ctx.kept = ctx.kept, None
            exp_logits, sum_exp, *_ = kept or _exp_logits(hidden[part], weight, bias, targets[part])
            grad_logits = _grad_logits(exp_logits, sum_exp, targets[part], grads[0][part]).to(hidden.dtype)
            grad_hidden[part] = linear(grad_logits, weight.T)
            if ctx.needs_input_grad[1]:
                if grad_weight is None:
                    grad_weight = grad_logits.T @ hidden[part]
                else:
                    grad_weight.addmm_(grad_logits.T, hidden[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            del kept, exp_logits, grad_logits  # free memory before the next chunk
        if ctx.leaf is not None:
            ctx.leaf.grad, grad_weight = grad_weight, None
        return grad_hidden, grad_weight, grad_bias, None, None


class _FrozenHeadLogps(torch.autograd.Function):
    """Log-probs of a frozen head. The forward pass computes the gradient too, so no chunk is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(targets):
            exp_logits, sum_exp, logps[part] = _exp_logits(hidden[part], weight, bias, targets[part])
            if grad_hidden is not None:
                grad_logits = _grad_logits(exp_logits, sum_exp, targets[part], torch.ones_like(logps[part]))
                grad_hidden[part] = _project_back(grad_logits.to(hidden.dtype), weight)
                del grad_logits
            del exp_logits  # free memory before the next chunk
        ctx.save_for_backward(grad_hidden)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grads[0][:, None]).to(grad_hidden.dtype), None, None, None


class FusedEmbedding(torch.autograd.Function):
    """`F.embedding` whose backward pass adds the gradient directly to `weight.grad`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        """Look up rows of `weight`. The row `padding_idx` gets no gradient."""
        ctx.save_for_backward(ids)
        ctx.leaf, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Accumulate into `weight.grad`."""
        (ids,), weight = ctx.saved_tensors, ctx.leaf
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        trained = torch.ones_like(ids, dtype=torch.bool) if ctx.padding_idx is None else ids != ctx.padding_idx
        weight.grad.index_add_(0, ids[trained], grads[0][trained])  # deterministic on CPUs, unlike index_put_
        return None, None, None


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dtype == hidden.dtype:
        return linear(hidden, weight, bias).float()
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    for start in range(0, len(weight), VOCABULARY_PART):
        part = slice(start, start + VOCABULARY_PART)
        logits[:, part] = linear(hidden, weight[part].to(hidden.dtype))
    return logits if bias is None else logits.add_(bias)


def _project_back(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient [n, width] of the hidden states."""
    if weight.dtype == grad_logits.dtype:
        return linear(grad_logits, weight.T)
    parts = zip(grad_logits.split(VOCABULARY_PART, 1), weight.split(VOCABULARY_PART), strict=True)
    return sum((linear(grads, rows.to(grads.dtype).T) for grads, rows in parts), torch.zeros(()).to(grad_logits))


def _exp_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
    """Return exp(logits - max) [n, vocabulary], its sums [n] and the targets' log-probs [n], in fp32, in place."""
    logits = _project(hidden, weight, bias)
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    max_logits = logits.max(1).values
    exp_logits = logits.sub_(max_logits[:, None]).exp_()
    sum_exp = exp_logits.sum(1)
    return exp_logits, sum_exp, target_logits - max_logits - sum_exp.log()


def _grad_logits(exp_logits: Tensor, sum_exp: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    """Overwrite `exp_logits` with the gradient of the logits, grad * (1[target] - softmax)."""
    grad_logits = exp_logits.mul_((-grad / sum_exp)[:, None])
    grad_logits[torch.arange(len(targets), device=targets.device), targets] += grad
    return grad_logits


def _chunks(targets: Tensor) -> list[slice]:
    size = GPU_HEAD_CHUNK if targets.is_cuda else HEAD_CHUNK
    return [slice(start, start + size) for start in range(0, len(targets), size)]
