"""The log-prob engine: one way to compute log pi(y|x), for the reference cache, training and evaluation alike.

It runs the transformer on the packed stream of `dpo.engine.packing` (no pads, each prompt once), projects to the
vocabulary only where a completion token is predicted, in chunks that are recomputed in the backward pass, and
takes the log-sum-exp in fp32. The full [tokens, vocabulary] matrix never exists.

An architecture for which the packed stream is not exact is found when the model is loaded, and computed row by
row with its own forward pass instead.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from tqdm.auto import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from dpo.common.errors import InputError
from dpo.engine.packing import TokenRow, budget_batches, pack
from dpo.engine.pretrained import load_weights
from dpo.engine.settings import Precision

ENGINE_VERSION = 5
"""Part of every reference cache's key; raise it whenever the numbers below could change."""

PACKED_ATTENTION = "dpo_packed"
HEAD_CHUNK, GPU_HEAD_CHUNK = 256, 1024
"""Positions projected to the vocabulary at a time: 50 MB of fp32 logits at a vocabulary of 49,152; 0.5 GB on a GPU
at one of 128,256, where each chunk reads and writes the gradient of the whole matrix."""

SELF_CHECK_TOLERANCE = 1e-3
"""Most nats by which packed and plain log-probs may differ in the self-check; a wrong mask differs by far more."""

Layout = list[tuple[int, tuple[int, ...]]]
"""Each row's prompt length and completion lengths."""

FLASH_WIDTH = 256
"""Widest attention head that variable-length attention can do; it also wants a multiple of 8."""

variable_length_attention: Callable[..., Any] = varlen_attn
if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # what torch 2.11 takes for granted
    variable_length_attention = functools.partial(varlen_attn, enable_gqa=True)

log = logging.getLogger(__name__)


class Segments(NamedTuple):
    """A layout for variable-length attention: S runs of queries, each with K_s keys that end where it ends."""

    queries: Tensor
    """int32 [S + 1], where each run begins in the stream, and its end."""
    keys: Tensor
    """int32 [S + 1], where each run's keys begin in `places`, and its end."""
    places: Tensor
    """int64 [sum of K_s], the stream positions of the keys."""
    most_queries: int
    most_keys: int


def segments(layout: Layout, device: torch.device) -> Segments:
    """Prompt and first completion as a run, each further completion as one whose keys begin with the prompt's."""
    queries: list[int] = []
    keys: list[int] = []
    places: list[Tensor] = []
    start = 0
    for prompt, (first, *others) in layout:
        end = start + prompt + first
        queries.append(prompt + first)
        keys.append(prompt + first)
        places.append(torch.arange(start, end))
        for length in others:
            queries.append(length)
            keys.append(prompt + length)
            places += [torch.arange(start, start + prompt), torch.arange(end, end + length)]
            end += length
        start = end
    begins, key_begins = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32).to(device) for n in (queries, keys))
    return Segments(begins, key_begins, torch.cat(places).to(device), max(queries), max(keys))


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention row by row: prompt and first completion causally, each further completion on prompt and itself.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]; returns [1, T, heads, head_dim].
    Dropout is never applied: log-probs must not be random.
    """
    if isinstance(layout, Segments):
        return _flash(query, key, value, layout, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # split, not slice: the backward pass of a slice fills a whole stream with zeros for each row.
    lengths = [n for prompt, (first, *others) in layout for n in (prompt + first, *others)]
    queries, keys, values = (iter(t.split(lengths, 2)) for t in (query, key, value))
    attend = functools.partial(_attend, scaling=scaling, window=sliding_window)
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


def _flash(
    query: Tensor, key: Tensor, value: Tensor, runs: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """All rows by one kernel, in bf16; nothing is computed for queries and keys that do not see each other."""
    own_query, own_key, own_value = (t[0].transpose(0, 1).to(torch.bfloat16) for t in (query, key, value))
    attended: Tensor = variable_length_attention(
        own_query,
        own_key.index_select(0, runs.places),
        own_value.index_select(0, runs.places),
        runs.queries,
        runs.keys,
        runs.most_queries,
        runs.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return attended[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of the last Q of K positions; the last query sees the last key."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or keys <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if window is not None:
        mask = mask.triu(keys - queries - window + 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target] by chunks, each worked on in place.

    The backward pass computes each chunk anew, but for the last, which it finds as it was. With `in_place` it adds
    the weight's gradient to `weight.grad` by itself.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, in_place: bool
    ) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        ctx.in_place = in_place
        for part in _chunks(targets):
            ctx.kept = None  # the chunk before goes first
            *ctx.kept, logps[part] = _exponentials(hidden[part], weight, bias, targets[part])
        ctx.save_for_backward(hidden, weight, bias, targets)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), weight.grad if ctx.in_place else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for part in reversed(_chunks(targets)):
            kept, ctx.kept = ctx.kept, None
            exponentials, total = kept or _exponentials(hidden[part], weight, bias, targets[part])[:2]
            slope = _slope(exponentials, total, targets[part], grads[0][part]).to(hidden.dtype)
            grad_hidden[part] = slope @ weight
            if ctx.needs_input_grad[1]:
                if grad_weight is None:
                    grad_weight = slope.T @ hidden[part]
                else:
                    grad_weight.addmm_(slope.T, hidden[part])
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            del kept, exponentials, slope  # before the next chunk
        if ctx.in_place:
            weight.grad, grad_weight = grad_weight, None
        return grad_hidden, grad_weight, grad_bias, None, None


class _Embedded(torch.autograd.Function):
    """F.embedding whose backward pass adds the gradient to `weight.grad` by itself."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, unchanged: int | None) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.unchanged = unchanged
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ids, weight = ctx.saved_tensors
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        learned = torch.ones_like(ids, dtype=torch.bool) if ctx.unchanged is None else ids != ctx.unchanged
        weight.grad.index_put_((ids[learned],), grads[0][learned], accumulate=True)
        return None, None, None


class _FrozenHeadLogps(torch.autograd.Function):
    """The same for a head that is not trained: its backward pass is done at once, and no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(targets):
            exponentials, total, logps[part] = _exponentials(hidden[part], weight, bias, targets[part])
            if slopes is not None:
                each = torch.ones_like(logps[part])
                slopes[part] = _slope(exponentials, total, targets[part], each).to(hidden.dtype) @ weight
            del exponentials  # before the next chunk
        ctx.save_for_backward(slopes)
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grads[0][:, None]).to(slopes.dtype), None, None, None


def _exponentials(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 exponentials [n, vocabulary] of logits less the largest, their sums [n], the targets' log-probs [n].

    In the memory of one matrix of logits.
    """
    logits = F.linear(hidden, weight, bias).float()
    chosen = logits.gather(1, targets[:, None])[:, 0]
    top = logits.max(1).values
    exponentials = logits.sub_(top[:, None]).exp_()
    total = exponentials.sum(1)
    return exponentials, total, chosen - top - total.log()


def _slope(exponentials: Tensor, total: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    """Gradient by the logits, grad * (1[target] - softmax), in place of the exponentials."""
    slope = exponentials.mul_((-grad / total)[:, None])
    slope[torch.arange(len(targets), device=targets.device), targets] += grad
    return slope


def _chunks(targets: Tensor) -> list[slice]:
    size = GPU_HEAD_CHUNK if targets.is_cuda else HEAD_CHUNK
    return [slice(start, start + size) for start in range(0, len(targets), size)]


def _forward(
    model: PreTrainedModel,
    *args: Any,
    packed: dict[str, Any] | None = None,
    distributions: bool = False,
    in_stream: bool,
    precision: Precision,
    in_place: bool = False,
    **kwargs: Any,
) -> Any:
    """Forward of a causal language model that also answers `model(packed=pack(rows))` with log-probs [C].

    With `distributions` the answer is the whole next-token distributions behind them, as chunks [n, vocabulary] of
    fp32 logits, in the order of the N completion tokens; models of one kind give chunks of the same sizes.
    """
    if packed is None:
        return type(model).forward(model, *args, **kwargs)
    if distributions:
        return (_stream_logits if in_stream else _plain_logits)(model, packed, precision)
    if in_stream:
        token_logps = _stream_logps(model, packed, precision, in_place)
    else:
        token_logps = _plain_logps(model, packed, precision)
    completions = sum(len(lengths) for _, lengths in packed["spans"])
    return torch.zeros(completions, device=token_logps.device).index_add(0, packed["owner"], token_logps)


def _stream_hidden(
    model: PreTrainedModel, packed: dict[str, Any], precision: Precision, in_place: bool = False
) -> Tensor:
    """Hidden states [N, width] that predict the N completion tokens, from one pass over the packed stream."""
    layout, ids, table = packed["spans"], packed["input_ids"], model.get_input_embeddings()
    if in_place and type(table) is nn.Embedding and table.weight.requires_grad:
        inputs = {"inputs_embeds": _Embedded.apply(ids, table.weight, table.padding_idx)}
    else:
        inputs = {"input_ids": ids}
    if model.device.type == "cuda" and precision == "bf16" and _fits_flash(model):
        layout = segments(layout, model.device)
    with _autocast(model, precision):
        hidden = model.get_decoder()(
            **inputs,
            position_ids=packed["position_ids"],
            layout=layout,
            use_cache=False,
        ).last_hidden_state[0]
    return hidden.index_select(0, packed["predict_from"]).to(model.get_output_embeddings().weight.dtype)


def _autocast(model: PreTrainedModel, precision: Precision) -> torch.autocast:
    """Multiply matrices in bf16 if `precision` is `bf16`.

    The weight cache is off: it would keep a bf16 copy of every trained weight until the pass ends, with gradient
    checkpointing and without gradients too. Each weight is used once per pass, so the cache saves nothing.
    """
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def _fits_flash(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width % 8 == 0 and width <= FLASH_WIDTH


def _stream_logps(
    model: PreTrainedModel, packed: dict[str, Any], precision: Precision, in_place: bool = False
) -> Tensor:
    """Log-probs [N] of the N completion tokens."""
    hidden, head = _stream_hidden(model, packed, precision, in_place), model.get_output_embeddings()
    given = hidden, head.weight, getattr(head, "bias", None), packed["targets"]
    if any(weight.requires_grad for weight in head.parameters()):
        return _TokenLogps.apply(*given, in_place)
    return _FrozenHeadLogps.apply(*given)


def _stream_logits(model: PreTrainedModel, packed: dict[str, Any], precision: Precision) -> Iterator[Tensor]:
    """Logits by chunks of `HEAD_CHUNK` completion tokens."""
    head = model.get_output_embeddings()
    for hidden in _stream_hidden(model, packed, precision).split(HEAD_CHUNK):
        yield F.linear(hidden, head.weight, getattr(head, "bias", None)).float()


def _plain_logits(model: PreTrainedModel, packed: dict[str, Any], precision: Precision) -> Iterator[Tensor]:
    """Logits by the model's own forward pass, one prompt with one completion at a time."""
    stream, start = packed["input_ids"][0], 0
    for prompt, completions in packed["spans"]:
        end = start + prompt
        for length in completions:
            ids = torch.cat([stream[start : start + prompt], stream[end : end + length]])[None]
            with _autocast(model, precision):
                logits = type(model).forward(model, input_ids=ids, use_cache=False).logits
            yield logits[0, prompt - 1 : -1].float()
            end += length
        start = end


def _plain_logps(model: PreTrainedModel, packed: dict[str, Any], precision: Precision) -> Tensor:
    """Log-probs [N] from those logits."""
    lengths = [length for _, completions in packed["spans"] for length in completions]
    targets = packed["targets"].split(lengths)
    logits = _plain_logits(model, packed, precision)
    return torch.cat(
        [rows.log_softmax(1).gather(1, ids[:, None])[:, 0] for rows, ids in zip(logits, targets, strict=True)]
    )


def load_model(path: Path, precision: Precision = "fp32", compiled: bool = False) -> PreTrainedModel:
    """Load a causal language model ready for `model(packed=...)`, weights in fp32, dropout off, in eval mode.

    On a GPU `bf16` multiplies the head's matrix in TF32, for the whole process.

    Args:
        path: a local folder with safetensors weights, or with a LoRA adapter that names its base.
        precision: of matrix products, wherever this model computes log-probs.
        compiled: let `torch.compile` fuse what lies between the products of each block.

    Raises:
        InputError: `compiled` without a GPU or without `bf16`.
    """
    if compiled and not (torch.cuda.is_available() and precision == "bf16"):
        raise InputError("params.yaml: engine.compile: true needs a CUDA GPU and precision: bf16; set it to false")
    torch.backends.cuda.matmul.allow_tf32 = precision == "bf16"
    model = load_weights(AutoModelForCausalLM, path).eval()
    for module in model.modules():
        rates = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        for name in ["p"] if isinstance(module, nn.Dropout) else rates:
            setattr(module, name, 0.0)
    fault = _stream_fault(model)
    if fault:
        log.warning("%s: %s; log-probs are computed row by row, which is slower", type(model).__name__, fault)
    else:
        model.set_attn_implementation(PACKED_ATTENTION)
    if compiled and not fault and _fits_flash(model):
        for block in model.modules():
            if type(block).__name__ in (model._no_split_modules or ()):
                block.compile(dynamic=True)
    model.forward = functools.partial(_forward, model, in_stream=not fault, precision=precision)
    return model


def accumulate_in_place(model: PreTrainedModel) -> None:
    """Let the backward pass of `model(packed=...)` add to the `.grad` of the vocabulary's matrices by itself.

    Otherwise each micro-batch makes a gradient of the size of the whole matrix for the head and another one for
    the embedding, which autograd adds up. For training in one process: DDP and FSDP wait for autograd to do that,
    and `torch.autograd.grad` asks it for the gradients.
    """
    model.forward.keywords["in_place"] = True


def precision_of(model: PreTrainedModel) -> Precision:
    """The precision that `load_model` was asked for."""
    return model.forward.keywords["precision"]


@torch.no_grad()
def _stream_fault(model: PreTrainedModel) -> str | None:
    """Why the packed stream is not exact for this model; None if it is, as a trial on a few tokens tells."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if {p.get("rope_type") for p in (rope, *rope.values()) if isinstance(p, dict)} & {"dynamic", "longrope"}:
        return "its rotary positions depend on the longest row of a batch"
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (18,), generator=torch.Generator().manual_seed(0)).split([5, 3, 4, 3, 1, 2])
    first, a, b, second, c, d = (tuple(part.tolist()) for part in ids)
    packed = to_device(pack([TokenRow("1", first, (a, b)), TokenRow("2", second, (c, d))]), model.device)
    plain = _plain_logps(model, packed, "fp32")
    own_attention = model.config._attn_implementation
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
        difference = (_stream_logps(model, packed, "fp32") - plain).abs().max().item()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"it cannot run the packed stream ({error})"
    finally:
        model.set_attn_implementation(own_attention)
    if difference <= SELF_CHECK_TOLERANCE:
        return None
    return f"its packed log-probs differ from plain ones by {difference:.2g} nats"


def to_device(packed: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a packed batch on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in packed.items()}


def packed_batches(
    rows: Sequence[TokenRow], max_tokens_per_microbatch: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Rows in their order, packed under a token budget."""
    for batch in budget_batches([row.tokens for row in rows], max_tokens_per_microbatch):
        yield to_device(pack([rows[i] for i in batch]), device)


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Make a model from `load_model` ready for `generate`, for the time of the block.

    It gets an attention that knows a cache; the forward pass of its class, whose signature tells `generate` which
    inputs the model takes, positions under padding among them; and none of its own settings for generation, such
    as a penalty for repetition, so that answers are drawn from the policy itself.
    """
    attention, settings, forward = model.config._attn_implementation, model.generation_config, model.forward
    if attention == PACKED_ATTENTION:
        model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig()
    del model.forward
    on_gpu = model.device.type == "cuda"
    try:
        # Blocks are compiled for the stream alone.
        with torch.compiler.set_stance("force_eager") if on_gpu else nullcontext():
            yield
    finally:
        model.set_attn_implementation(attention)
        model.generation_config, model.forward = settings, forward


@torch.no_grad()
def sequence_logps(
    model: PreTrainedModel, rows: Sequence[TokenRow], max_tokens_per_microbatch: int, title: str = "log-probs"
) -> Tensor:
    """log pi(y|x) of every completion, summed over its tokens, in nats.

    Args:
        model: from `load_model`.
        rows: R rows with the same number of completions K.
        max_tokens_per_microbatch: most tokens in one forward pass.
        title: label of the progress bar.

    Returns:
        fp32 on the CPU, shape [R, K].
    """
    parts = []
    with tqdm(total=len(rows), desc=title, unit="row", mininterval=2) as bar:
        for packed in packed_batches(rows, max_tokens_per_microbatch, model.device):
            parts.append(model(packed=packed).cpu())
            bar.update(len(packed["ids"]))
    return torch.cat(parts).view(len(rows), -1)
