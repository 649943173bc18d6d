"""Tokens and FLOPs of work on token rows: one count for all methods.

A forward pass takes 2 FLOPs per token and weight of the linear layers, and 4 per (query, key) position that
attends and element of a query; a backward pass takes twice as many (Kaplan et al. 2020, "Scaling Laws for Neural
Language Models", section 2.1). The layers process each prompt of a row once, the vocabulary projection processes
the tokens of completions only. Training takes a forward pass, the gradient of the activations and the gradient of
the weights; with LoRA the last in attention only. Sampling a response takes the forward pass of its tokens.
Recomputation, norms, softmax and the optimizer are not counted, so the count does not depend on the
implementation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dpo.common.errors import InputError
from dpo.engine.tokenization import TokenRow

Work = Literal["sampled", "scored", "trained"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with the Llama architecture, or of one whose MLPs are all mixtures of experts."""

    layers: int
    hidden: int
    intermediate: int
    """Width of an MLP, or of one expert."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the head and the input embedding share a matrix."""
    experts: int = 0
    """Experts per layer; 0 is an MLP without a router."""
    active: int = 1
    """Experts that process a token."""

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a block: q, k, v, o, and without experts gate, up, down."""
        hidden, query, key = self.hidden, self.query, self.kv_heads * self.head_dim
        mlp = [] if self.experts else [(hidden, self.intermediate)] * 2 + [(self.intermediate, hidden)]
        return [(hidden, query), (hidden, key), (hidden, key), (query, hidden), *mlp]

    @property
    def stacked(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the two matrices of an expert: gate and up together, and down."""
        return [(self.hidden, 2 * self.intermediate), (self.intermediate, self.hidden)] if self.experts else []

    @property
    def expert(self) -> int:
        """Parameters of one expert; 0 without experts."""
        return sum(inputs * outputs for inputs, outputs in self.stacked)

    @property
    def products(self) -> int:
        """Parameters of the linear layers and of all experts of a block. Routers are not among them."""
        return sum(inputs * outputs for inputs, outputs in self.linear) + self.experts * self.expert

    @property
    def layer(self) -> int:
        """Parameters of a block."""
        return self.products + (2 + self.experts) * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the projection to the vocabulary."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model: blocks, last norm, embedding and head."""
        return self.layers * self.layer + self.hidden + (1 if self.tied else 2) * self.head

    @property
    def inactive(self) -> int:
        """Parameters of the experts of a block that do not process a token."""
        return max(0, self.experts - self.active) * self.expert


OTHER_LAYERS = {"mlp_only_layers": [], "decoder_sparse_step": 1, "first_k_dense_replace": 0}
"""Settings of mixtures with further kinds of layers, and their values if all layers have the same experts."""
EXPERTS = {"num_experts", "num_local_experts", "num_experts_per_tok"}


def shape_of(config: Any) -> Shape:
    """Return the shape of a transformers config.

    Raises:
        InputError: a size is missing, or the layers have other parts than attention and an MLP or experts.
    """
    own = {name: value for name, value in vars(config).items() if not name.startswith("_") and value}
    others = [name for name in own if "expert" in name and name not in EXPERTS]
    others += [name for name, usual in OTHER_LAYERS.items() if (getattr(config, name, None) or usual) != usual]
    if others:
        reason = f"no plan for a model of type '{config.model_type}' with {', '.join(others)}"
        raise InputError(f"{reason}; use a Llama of its size")
    try:
        layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        experts = own.get("num_experts") or own.get("num_local_experts") or 0
        active = config.num_experts_per_tok if experts else 1
        intermediate = (experts and own.get("moe_intermediate_size")) or config.intermediate_size
        sizes = layers, hidden, intermediate, heads, kv_heads, head_dim, config.vocab_size
        return Shape(*sizes, tied=config.tie_word_embeddings, experts=experts, active=active)
    except AttributeError as error:
        reason = f"no plan for a model of type '{config.model_type}': {error}; use a Llama of its size"
        raise InputError(reason) from error


def forward_flops(shape: Shape, tokens: int, projected: int, seen: int) -> tuple[int, int, int]:
    """Return the FLOPs of a forward pass as (layers, head, attention).

    The layers process `tokens` and the head `projected` tokens, with 2 FLOPs per weight, without experts that do
    not process the token. `seen` (query, key) positions attend, with 4 FLOPs per element of a query.
    """
    attention = 4 * shape.layers * shape.query * seen
    products = shape.products - shape.inactive + shape.experts * shape.hidden
    return 2 * shape.layers * products * tokens, 2 * shape.head * projected, attention


@dataclass(frozen=True)
class Cost:
    """Tokens and FLOPs of a piece of work. Costs can be added."""

    sampled_tokens: int = 0
    """Tokens of sampled responses."""
    scored_tokens: int = 0
    """Tokens of prompts and completions in forward passes alone."""
    trained_tokens: int = 0
    """Tokens of prompts and completions in forward and backward passes."""
    flops: float | None = 0.0
    """FLOPs of all of them; None if the architecture is not known."""

    def __add__(self, other: "Cost") -> "Cost":
        known = None if self.flops is None or other.flops is None else self.flops + other.flops
        return Cost(
            self.sampled_tokens + other.sampled_tokens,
            self.scored_tokens + other.scored_tokens,
            self.trained_tokens + other.trained_tokens,
            known,
        )


def cost_of(
    rows: Iterable[TokenRow], config: Any, work: Work, *, lora: bool = False, extra_passes: int = 0
) -> Cost:
    """Return the cost of sampling, scoring or training the completions of rows once.

    Args:
        rows: prompts with their completions.
        config: transformers config of the model.
        work: what is done with the completions.
        lora: whether only an adapter is trained.
        extra_passes: forward passes of a training step besides the one with a backward pass.
    """
    tokens, completions, seen = 0, 0, 0
    for row in rows:
        tokens, completions, seen = tokens + row.tokens, completions + row.completion_tokens, seen + attended(row)
    counted = {f"{work}_tokens": completions if work == "sampled" else tokens}
    try:
        layers, head, attention = forward_flops(shape_of(config), tokens, completions, seen)
    except InputError:
        return Cost(**counted, flops=None)
    forward = layers + head + attention
    if work != "trained":
        return Cost(**counted, flops=forward)
    return Cost(**counted, flops=(2 if lora else 3) * (layers + head) + 3 * attention + extra_passes * forward)


def attended(row: TokenRow) -> int:
    """Return the number of unmasked (query, key) pairs of a row."""
    prompt, *completions = len(row.prompt), *map(len, row.completions)
    return sum(n * (n + 1) // 2 for n in (prompt, *completions)) + prompt * sum(completions)
