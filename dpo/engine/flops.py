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
from dataclasses import dataclass, replace
from typing import Any, Literal

from dpo.common.errors import InputError
from dpo.engine.tokenization import TokenRow

Work = Literal["sampled", "scored", "trained"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with the Llama architecture, in which MLPs may be mixtures of experts."""

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
    shared: int = 0
    """Width of a shared expert, an MLP that processes every token of a layer with experts; 0 without one."""
    dense_layers: int = 0
    """Layers with an MLP instead of experts."""
    dense_intermediate: int = 0
    """Width of their MLP."""

    @property
    def kinds(self) -> list["Shape"]:
        """Shapes whose layers are all alike: that of the layers with experts, and that of those without.

        The other properties of a layer are those of a layer with experts.
        """
        if not self.dense_layers:
            return [self]
        sparse = replace(self, layers=self.layers - self.dense_layers, dense_layers=0)
        dense = replace(sparse, layers=self.dense_layers, intermediate=self.dense_intermediate)
        return [sparse, replace(dense, experts=0, active=1, shared=0)]

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a block: q, k, v, o, and those of an MLP or shared expert."""
        hidden, query, key = self.hidden, self.query, self.kv_heads * self.head_dim
        width = self.shared if self.experts else self.intermediate
        mlp = [(hidden, width)] * 2 + [(width, hidden)] if width else []
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
    def updates(self) -> int:
        """Parameters of the LoRA updates of rank 1 of all linear layers and experts of a block."""
        return sum(map(sum, self.linear)) + self.experts * sum(map(sum, self.stacked))

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
        blocks = sum(kind.layers * kind.layer for kind in self.kinds)
        return blocks + self.hidden + (1 if self.tied else 2) * self.head

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of the model, without shared experts."""
        return sum(kind.layers * kind.experts * kind.expert for kind in self.kinds)

    @property
    def active_parameters(self) -> int:
        """Parameters of the model without the experts that do not process a token."""
        return self.parameters - sum(kind.layers * kind.inactive for kind in self.kinds)

    @property
    def inactive(self) -> int:
        """Parameters of the experts of a block that do not process a token."""
        return max(0, self.experts - self.active) * self.expert


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SHARED = ("shared_expert_intermediate_size", "n_shared_experts")
SPARSE = {*EXPERTS, *SHARED, "num_experts_per_tok", "moe_intermediate_size"}
"""Settings of mixtures that `shape_of` reads."""
FULL_ATTENTION = {"full_attention", "sliding_attention"}
OTHER_PARTS = ("kv_lora_rank", "intermediate_size_mlp")
"""Settings of models with another attention (DeepSeek) or with another order of layers (Llama 4)."""
TOLERANCE = 0.02
"""Share of the parameters that a shape may lack: biases and further norms."""


def shape_of(config: Any) -> Shape:
    """Return the shape of a transformers config.

    Raises:
        InputError: a size is missing, or the layers have other parts than attention, an MLP, experts and a shared
            expert.
    """
    own = {name: value for name, value in vars(config).items() if not name.startswith("_") and value}
    others = [name for name in own if name in OTHER_PARTS or _is_unknown(name)]
    if set(own.get("layer_types") or ()) - FULL_ATTENTION:
        others.append("layer_types")
    if own.get("moe_layer_freq", 1) != 1:
        others.append("moe_layer_freq")
    if others:
        raise _no_plan(config, f"the plan does not know {', '.join(others)}")
    try:
        layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        sizes = layers, hidden, config.intermediate_size, heads, kv_heads, head_dim, config.vocab_size
        shape = Shape(*sizes, tied=config.tie_word_embeddings)
        experts, dense = next((own[name] for name in EXPERTS if name in own), 0), _dense_layers(own, layers)
        if not experts or dense == layers:
            return shape
        width = own.get("moe_intermediate_size") or shape.intermediate
        return replace(
            shape, intermediate=width, experts=experts, active=config.num_experts_per_tok,
            shared=own.get("shared_expert_intermediate_size") or own.get("n_shared_experts", 0) * width,
            dense_layers=dense, dense_intermediate=shape.intermediate if dense else 0,
        )  # fmt: skip
    except AttributeError as error:
        raise _no_plan(config, str(error)) from error


def checked_shape(config: Any) -> Shape:
    """Return `shape_of(config)` if a model of this config has as many parameters. No weight is allocated.

    Raises:
        InputError: the number of parameters differs by more than 2%, or `shape_of` raises it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    shape = shape_of(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise _no_plan(config, str(error)) from error
    parameters = sum(weight.numel() for weight in model.parameters())
    if abs(parameters - shape.parameters) > TOLERANCE * parameters:
        raise _no_plan(
            config, f"the plan counts {shape.parameters:,} parameters, but the model has {parameters:,}"
        )
    return shape


def _is_unknown(name: str) -> bool:
    """Return whether a setting describes experts in a way that `shape_of` does not know."""
    return ("expert" in name or name.startswith("shared_")) and name not in SPARSE


def _dense_layers(own: dict[str, Any], layers: int) -> int:
    """Return the number of layers without experts of a mixture with these settings."""
    if "mlp_layer_types" in own:
        return sum(kind != "sparse" for kind in own["mlp_layer_types"])
    step, dense = own.get("decoder_sparse_step", 1), set(own.get("mlp_only_layers", ()))
    dense |= set(range(own.get("first_k_dense_replace", 0)))
    return sum(layer in dense or (layer + 1) % step != 0 for layer in range(layers))


def _no_plan(config: Any, reason: str) -> InputError:
    return InputError(f"no plan for a model of type '{config.model_type}': {reason}; use a Llama of its size")


def forward_flops(shape: Shape, tokens: int, projected: int, seen: int) -> tuple[int, int, int]:
    """Return the FLOPs of a forward pass as (layers, head, attention).

    The layers process `tokens` and the head `projected` tokens, with 2 FLOPs per weight, without experts that do
    not process the token. `seen` (query, key) positions attend, with 4 FLOPs per element of a query.
    """
    attention = 4 * shape.layers * shape.query * seen
    products = sum(
        kind.layers * (kind.products - kind.inactive + kind.experts * kind.hidden) for kind in shape.kinds
    )
    return 2 * products * tokens, 2 * shape.head * projected, attention


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
