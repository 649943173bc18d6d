"""The log-prob engine: one way to compute log pi(y|x) for the reference cache, training and evaluation.

The engine runs the transformer on a packed stream (`dpo.engine.packing`: no padding, each prompt once). It
projects only the positions that predict a completion token to the vocabulary (`dpo.engine.head`) and takes the
log-sum-exp in fp32.

When a model is loaded, a self-check compares the packed stream with the model's own forward pass. If they differ,
the engine computes this model row by row with its own forward pass.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from dpo.common.distributed import shards_weights
from dpo.common.errors import InputError
from dpo.common.progress import progress
from dpo.engine.attention import PACKED_ATTENTION, VarlenMetadata, supports_varlen, varlen_metadata
from dpo.engine.frozen import (
    ProductsInFp32,
    hold_frozen_in_bf16,
    load_in_bf16,
    log_experts_left_out,
    multiply_in_bf16,
    nf4_options,
    use_one_product,
)
from dpo.engine.head import FusedEmbedding, chunked_logits, project, token_logps
from dpo.engine.kv_cache import KVCache
from dpo.engine.packing import Layout, PackedBatch, budget_batches, pack, pack_prompts
from dpo.engine.pretrained import (
    ADAPTER,
    ADAPTER_CONFIG,
    REFERENCE_ADAPTER,
    add_reference_adapter,
    has_adapter,
    load_causal_lm,
)
from dpo.engine.products import use_onednn
from dpo.engine.settings import Precision, Quantization
from dpo.engine.sharding import empty_model, read_shards, release
from dpo.engine.tokenization import TokenRow

ENGINE_VERSION = 6
"""Part of the key of every reference cache. Increment it if the results of this package can change."""

SELF_CHECK_TOLERANCE = 1e-3
"""Maximum difference in nats between packed and plain log-probs. A wrong mask differs by far more."""

log = logging.getLogger(__name__)


class LogProbModel(nn.Module):
    """A causal language model that computes log-probs of packed completions.

    Save and load weights through `model`, the transformers model, so that their names have no prefix.

    Attributes:
        model: the transformers model. Its parameters are unchanged.
        precision: precision of matrix products.
        vocabulary: data type of the embedding and the projection to the vocabulary, if they are not trained.
        in_stream: whether the packed stream is exact for this model. If not, it is computed row by row.
        accumulate_in_place: whether the backward pass adds gradients of the vocabulary matrices directly to
            `.grad`. This saves one gradient of each matrix per micro-batch. Set it only for training in one
            process: DDP, FSDP and `torch.autograd.grad` need gradients from autograd.
        folder: the folder that the model was loaded from.
        sharded: whether the weights are sharded over the processes.
        is_empty: whether the weights are not read yet; see `shard`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        precision: Precision = "fp32",
        *,
        in_stream: bool,
        vocabulary: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.model, self.precision, self.in_stream, self.vocabulary = model, precision, in_stream, vocabulary
        self.accumulate_in_place = self.compiled = self.sharded = self.is_empty = False
        self.folder: Path | None = None
        use_onednn(model)

    def get_output_embeddings(self) -> nn.Linear:
        """Return the projection to the vocabulary."""
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def forward(self, batch: PackedBatch, *, per_token: bool = False, collisions: bool = False) -> Tensor:
        """Return log-probs [C] of the completions, in nats, summed over their tokens; [N] with `per_token`.

        With `collisions`, return log sum_v pi(v)^2 over the vocabulary at each completion token instead, [N]: the
        log of the probability that two samples of this token are equal.
        """
        if collisions:
            return torch.cat([(2 * logits.log_softmax(1)).logsumexp(1) for logits in self.logits(batch)])
        logps = self._token_logps(batch)
        return logps if per_token else batch.sum_per_completion(logps)

    def logits(self, batch: PackedBatch) -> Iterator[Tensor]:
        """Yield fp32 next-token logits [n, vocabulary] in chunks, in the order of the N completion tokens.

        Models of the same architecture yield chunks of the same sizes.
        """
        if self.in_stream:
            return chunked_logits(self._hidden(batch), self.get_output_embeddings())
        return self._plain_logits(batch)

    def start_responses(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Tensor, KVCache]:
        """Compute R prompts and prepare for responses of up to `new_tokens` tokens. Needs `in_stream`.

        Equal prompts, and the common start of all prompts, are computed once.

        Returns:
            The fp32 logits [R, vocabulary] of the first tokens, and the cache for `continue_responses`.
        """
        input_ids, position_ids, layout, places = pack_prompts(prompts)
        cache = KVCache(places, new_tokens, self.device)
        ids, positions = (torch.tensor([values], device=self.device) for values in (input_ids, position_ids))
        states = self._states(input_ids=ids, position_ids=positions, layout=self._layout(layout), cache=cache)
        last = torch.tensor([row[-1] for row in places], device=self.device)
        return self._next_logits(states[0].index_select(0, last)), cache

    def continue_responses(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append tokens [R] to the responses and return the fp32 logits [R, vocabulary] of the next tokens."""
        cache.add_column()
        positions = torch.tensor(cache.next_positions, device=self.device)
        states = self._states(input_ids=tokens[:, None], position_ids=positions[:, None], layout=None, cache=cache)
        return self._next_logits(states[:, 0])

    def _next_logits(self, states: Tensor) -> Tensor:
        return project(states, self.get_output_embeddings())

    def hold_frozen_weights(self) -> None:
        """Hold weights that require no gradient in bf16 if the precision is `bf16`.

        Results do not change, except that the updates of adapted experts are added in bf16.
        """
        if self.precision == "bf16":
            hold_frozen_in_bf16(self.model, vocabulary=self.vocabulary == "bf16")

    def shard(self) -> None:
        """Shard the weights over the processes and read them, if the launch configuration says so.

        Call this after adapters and data types are set. It has no effect on a model that has its weights.
        """
        if self.is_empty:
            assert self.folder is not None
            read_shards(self.model, self.folder)
            self.sharded, self.is_empty = True, False
            self.check_stream()
            release(self.model)

    def check_stream(self) -> None:
        """Decide whether the packed stream computes this model, and compile its layers if it does."""
        tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        with ProductsInFp32():  # the self-check compares fp32 results
            fault = _self_check(self.model)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        self.in_stream = not fault
        if fault:
            name = type(self.model).__name__
            log.warning("%s: %s; log-probs are computed row by row, which is slower", name, fault)
            return
        self.model.set_attn_implementation(PACKED_ATTENTION)
        if self.compiled and supports_varlen(self.model):
            for block in self.model.modules():
                if type(block).__name__ in (self.model._no_split_modules or ()):
                    block.compile(dynamic=True)

    def share_base(self, reference: Path) -> bool:
        """Prepare `reference_logits` if the model is a LoRA adapter on the base model of `reference`.

        `reference` is the folder of the base model, with or without an adapter of its own, which is then loaded
        beside that of this model. Return False if the model is no such adapter, or if it is sharded and the
        reference has an adapter.
        """
        if self.sharded and (reference / ADAPTER_CONFIG).is_file():
            return False
        if not has_adapter(self.model) or Path(self.model.name_or_path).resolve() != reference.resolve():
            return False
        if (reference / ADAPTER_CONFIG).is_file():
            device = self.device
            add_reference_adapter(self.model, reference)
            self.hold_frozen_weights()
            self.to(device)
        return True

    def reference_logits(self, batch: PackedBatch) -> Iterator[Tensor]:
        """Yield the logits of the reference that `share_base` has prepared, as `logits` does."""
        with self._as_reference():
            chunks = self.logits(batch)
        while True:
            with self._as_reference():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Inside the block, use the reference's adapter, or none, in place of the model's own."""
        has_own = REFERENCE_ADAPTER in self.model.peft_config
        if has_own:
            self.model.set_adapter(REFERENCE_ADAPTER)
        else:
            self.model.disable_adapters()
        try:
            yield
        finally:
            if has_own:
                self.model.set_adapter(ADAPTER)
            else:
                self.model.enable_adapters()

    @contextmanager
    def generation(self) -> Iterator[PreTrainedModel]:
        """Prepare the transformers model for `generate` inside the block.

        The attention supports a cache, and matrix products have the engine's precision. The model's own generation
        settings, such as a repetition penalty, are removed, so that samples are drawn from the policy.
        """
        model = self.model
        attention, settings = model.config._attn_implementation, model.generation_config
        if attention == PACKED_ATTENTION:
            model.set_attn_implementation("sdpa")
        model.generation_config = GenerationConfig()
        try:
            with self._autocast():
                yield model
        finally:
            model.set_attn_implementation(attention)
            model.generation_config = settings

    def _token_logps(self, batch: PackedBatch) -> Tensor:
        """Return log-probs [N] of the completion tokens."""
        if self.in_stream:
            head, in_place = self.get_output_embeddings(), self.accumulate_in_place
            return token_logps(self._hidden(batch), head, batch.targets, accumulate_in_place=in_place)
        parts = zip(self._plain_logits(batch), batch.targets.split(batch.lengths.tolist()), strict=True)
        return torch.cat([logits.log_softmax(1).gather(1, targets[:, None])[:, 0] for logits, targets in parts])

    def _hidden(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states [N, width] that predict the completion tokens, from one packed pass."""
        table = self.model.get_input_embeddings()
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if self.accumulate_in_place and type(table) is nn.Embedding and table.weight.requires_grad:
            inputs = {"inputs_embeds": FusedEmbedding.apply(batch.input_ids, table.weight, table.padding_idx)}
        hidden = self._states(**inputs, position_ids=batch.position_ids, layout=self._layout(batch.layout))
        return hidden[0].index_select(0, batch.logit_positions)

    def _layout(self, layout: Layout) -> Layout | VarlenMetadata:
        """Return a layout in the form for the attention that this device and precision use."""
        if self.device.type == "cuda" and self.precision == "bf16" and supports_varlen(self.model):
            return varlen_metadata(layout, self.device)
        return layout

    def _states(self, **inputs: Any) -> Tensor:
        """Return the transformer's output [rows, T, width] in the head's precision."""
        eager = self.device.type == "cuda" and "cache" in inputs  # blocks are compiled only for packed batches
        with self._autocast(), torch.compiler.set_stance("force_eager") if eager else nullcontext():
            output = self.model.get_decoder()(**inputs, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states.float()

    def _plain_logits(self, batch: PackedBatch) -> Iterator[Tensor]:
        """Yield the logits of one completion at a time from the model's own forward pass."""
        stream, start, positions = batch.input_ids[0], 0, iter(batch.logit_positions.split(batch.lengths.tolist()))
        for prompt, completions in batch.layout:
            end = start + prompt
            for length in completions:
                ids = torch.cat([stream[start : start + prompt], stream[end : end + length]])[None]
                with self._autocast():
                    logits = self.model(input_ids=ids, use_cache=False).logits
                yield logits[0, prompt - 1 + (next(positions) - end + 1).clamp_min(0)].float()
                end += length
            start = end

    def _autocast(self) -> torch.autocast:
        """Multiply matrices in bf16 if the precision is `bf16`."""
        enabled = self.precision == "bf16"
        # The weight cache would keep bf16 copies of trained weights until the pass ends, but each is used once.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def load_model(
    path: Path,
    precision: Precision = "fp32",
    compiled: bool = False,
    *,
    quantization: Quantization = None,
    vocabulary: Precision = "fp32",
    frozen: bool | Literal["base"] = False,
) -> LogProbModel:
    """Load a causal language model without dropout, in eval mode. Weights are fp32, or NF4 with `quantization`.

    `path` is a folder with safetensors weights, a LoRA adapter (`dpo.engine.pretrained.adapter_base`), or both. A
    model that is `frozen` is not trained, so that `bf16` also holds its weights in bf16. With `base`, only an
    adapter is trained: `bf16` loads a checkpoint in bf16 without casting its layers to fp32. On a GPU, `bf16`
    enables TF32 for fp32 matrix products in this process. `compiled` fuses the operations of each block.

    If the launch configuration shards weights, a model that is not `frozen` is returned without weights; training
    adds adapters and calls `LogProbModel.shard`.

    Raises:
        InputError: `compiled` is set without a GPU or without `bf16`, or `quantization` with sharded weights.
    """
    if compiled and not (torch.cuda.is_available() and precision == "bf16"):
        raise InputError("params.yaml: engine.compile: true needs a CUDA GPU and precision: bf16; set it to false")
    is_empty = shards_weights()
    if is_empty and quantization is not None:
        raise InputError(
            "params.yaml: engine.quantization does not work with sharded weights (FSDP); set it to null, or set "
            "run.launch to null or to a configuration for DDP"
        )
    options = {} if quantization is None else nf4_options()
    model = load_in_bf16(path) if frozen and precision == "bf16" and not options and not is_empty else None
    model = (model or (empty_model(path) if is_empty else load_causal_lm(path, **options))).eval()
    use_one_product(model)
    log_experts_left_out(model)
    for module in model.modules():
        rates = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        for name in ["p"] if isinstance(module, nn.Dropout) else rates:
            setattr(module, name, 0.0)
    torch.backends.cuda.matmul.allow_tf32 = precision == "bf16"
    engine = LogProbModel(model, precision, in_stream=False, vocabulary=vocabulary).eval()
    engine.compiled, engine.folder, engine.is_empty = compiled, path, is_empty
    if not is_empty:
        engine.check_stream()
    if precision == "bf16":
        multiply_in_bf16(model)
    if frozen is True:
        model.requires_grad_(False)
        engine.hold_frozen_weights()
        engine.shard()
    return engine


@torch.no_grad()
def _self_check(model: PreTrainedModel) -> str | None:
    """Return why the packed stream is not exact for this model, or None if it is. Compares a few tokens."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if {p.get("rope_type") for p in (rope, *rope.values()) if isinstance(p, dict)} & {"dynamic", "longrope"}:
        return "its rotary positions depend on the longest row of a batch"
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (18,), generator=torch.Generator().manual_seed(0)).split([5, 3, 4, 3, 1, 2])
    first, a, b, second, c, d = (tuple(part.tolist()) for part in ids)
    batch = pack([TokenRow("1", first, (a, b)), TokenRow("2", second, (c, d))]).to(model.device)
    plain = LogProbModel(model, in_stream=False)._token_logps(batch)
    own_attention = model.config._attn_implementation
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
        packed = LogProbModel(model, in_stream=True)._token_logps(batch)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"it cannot run the packed stream ({error})"
    finally:
        model.set_attn_implementation(own_attention)
    difference = (packed - plain).abs().max().item()
    if difference <= SELF_CHECK_TOLERANCE:
        return None
    return f"its packed log-probs differ from plain ones by {difference:.2g} nats"


def packed_batches(
    rows: Sequence[TokenRow], max_tokens_per_microbatch: int, device: torch.device
) -> Iterator[PackedBatch]:
    """Pack rows in their order into batches under a token budget, on `device`."""
    for batch in budget_batches([row.tokens for row in rows], max_tokens_per_microbatch):
        yield pack([rows[i] for i in batch]).to(device)


@torch.no_grad()
def sequence_logps(
    model: LogProbModel, rows: Sequence[TokenRow], max_tokens_per_microbatch: int, title: str = "log-probs"
) -> Tensor:
    """Return log pi(y|x) of R rows with K completions each, in nats, summed over tokens: fp32 [R, K] on the CPU.

    A forward pass has at most `max_tokens_per_microbatch` tokens. `title` is the label of the progress bar.
    """
    parts = []
    with progress(total=len(rows), desc=title, unit="row", mininterval=2) as bar:
        for batch in packed_batches(rows, max_tokens_per_microbatch, model.device):
            parts.append(model(batch).cpu())
            bar.update(len(batch.ids))
    return torch.cat(parts).view(len(rows), -1)
