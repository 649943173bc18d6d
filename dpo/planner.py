"""Estimates of peak GPU memory and hours of a training, from the shape of the model.

The formulas describe the engine: a packed stream of at most `max_tokens_per_microbatch` tokens; weights, gradients
and optimizer states in fp32; layers in fp32 or bf16; the vocabulary in fp32 in chunks of `HEAD_CHUNK` positions;
reference log-probs from a cache. They hold for the Llama architecture: grouped-query attention, a gated MLP and
two RMSNorms per layer.
"""

from dataclasses import dataclass
from typing import Any, Literal

from dpo.common.errors import InputError
from dpo.engine.settings import HEAD_CHUNK, Precision

Sharding = Literal["none", "data", "full"]
"""`none`: one process. `data` (DDP): a replica per process. `full` (FSDP2): weights, gradients, states sharded."""

STATE_BYTES = {"adamw": 8, "rmsprop": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer state per trained parameter."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with the Llama architecture."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the head and the input embedding share a matrix."""

    @property
    def query(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the seven linear layers of a block: q, k, v, o, gate, up, down."""
        hidden, query, key = self.hidden, self.query, self.kv_heads * self.head_dim
        attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        return [*attention, *[(hidden, self.intermediate)] * 2, (self.intermediate, hidden)]

    @property
    def layer(self) -> int:
        """Parameters of a block."""
        return sum(inputs * outputs for inputs, outputs in self.matrices) + 2 * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the projection to the vocabulary."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model: blocks, last norm, embedding and head."""
        return self.layers * self.layer + self.hidden + (1 if self.tied else 2) * self.head


LLAMAS = {
    "llama-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "llama-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, tied=False),
}
"""Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B (Grattafiori et al. 2024, table 3, and the model cards)."""


def shape_of(config: Any) -> Shape:
    """Return the shape of a transformers config.

    Raises:
        InputError: a size is missing, or the model has experts, so it does not have the Llama architecture.
    """
    if any("expert" in name and not name.startswith("_") for name in vars(config)):
        raise InputError(f"no plan for a model with experts, '{config.model_type}'; use a Llama of its size")
    try:
        layers, hidden, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        sizes = layers, hidden, config.intermediate_size, heads, kv_heads, head_dim, config.vocab_size
        return Shape(*sizes, tied=config.tie_word_embeddings)
    except AttributeError as error:
        reason = f"no plan for a model of type '{config.model_type}': {error}; use a Llama of its size"
        raise InputError(reason) from error


@dataclass(frozen=True)
class Pair:
    """Mean lengths of a pair in tokens."""

    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        """Stream positions: one prompt and two completions."""
        return self.prompt + 2 * self.completion

    @property
    def seen(self) -> int:
        """Number of (query, key) positions that attend."""
        prompt, completion = self.prompt, self.completion
        return prompt * (prompt + 1) // 2 + completion * (completion + 1) + 2 * prompt * completion


@dataclass(frozen=True)
class Setup:
    """Settings of a training."""

    max_tokens_per_microbatch: int
    """Tokens in a micro-batch of one GPU."""
    precision: Precision = "fp32"
    lora_rank: int | None = None
    """Rank of the adapters. None trains all weights."""
    gradient_checkpointing: bool = False
    accumulates: bool = True
    """Whether a step has several micro-batches. If so, gradients and all activations exist at the same time."""
    optimizer: str = "adamw"
    sharding: Sharding = "none"
    gpus: int = 1
    head_chunk: int = HEAD_CHUNK
    """Positions per projection to the vocabulary."""

    @property
    def width(self) -> int:
        """Bytes per element of the layers."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Memory:
    """Peak bytes per GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float
    """Logits, gradient of the head, gathered layers."""
    overhead: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(vars(self).values())


def trained_parameters(shape: Shape, lora_rank: int | None) -> int:
    """Return the number of parameters with gradients and optimizer states."""
    if lora_rank is None:
        return shape.parameters
    return shape.layers * lora_rank * sum(inputs + outputs for inputs, outputs in shape.matrices)


def layer_activations(shape: Shape, pair: Pair, setup: Setup) -> float:
    """Return the bytes that a layer keeps for its backward pass, and in bf16 those of its rounded weights.

    Norms keep their input and, if their weight is trained, the normalised input, in fp32. Linear layers keep their
    inputs: in fp32 one tensor for q, k and v and one for gate and up, in bf16 a rounded copy for each of the five.
    Attention keeps queries, keys and values (repeated per query head), its output before and after the transpose,
    the log-sum-exp, and for the second completion the keys and values of prompt and completion with a mask. The
    MLP keeps gate, its activation, up and their product. LoRA keeps the inner vector of each of the seven updates.
    """
    fp32 = setup.precision == "fp32"
    norms = 2 * 4 * shape.hidden * (2 if setup.lora_rank is None else 1)
    inputs = setup.width * shape.hidden * (2 if fp32 else 5)
    again = (pair.prompt + pair.completion) / pair.tokens
    mask = setup.width * pair.completion * (pair.prompt + pair.completion) / pair.tokens
    attention = setup.width * shape.query * (5 + 2 * again) + 4 * shape.heads + mask
    mlp = 4 * setup.width * shape.intermediate
    per_token = norms + inputs + attention + mlp + setup.width * 7 * (setup.lora_rank or 0)
    return setup.max_tokens_per_microbatch * per_token + (0 if fp32 else 2 * shape.layer)


def activations(shape: Shape, pair: Pair, setup: Setup) -> float:
    """Return the bytes that the forward pass of one micro-batch keeps for the backward pass.

    With gradient checkpointing each layer keeps its input only. After the layers, the last norm and the hidden
    states of the completions are kept.
    """
    kept = setup.max_tokens_per_microbatch * 4 * shape.hidden
    layer = kept if setup.gradient_checkpointing else layer_activations(shape, pair, setup)
    norm = 2 if setup.lora_rank is None else 1
    return shape.layers * layer + kept * (norm + 2 * pair.completion / pair.tokens)


def training_memory(shape: Shape, pair: Pair, setup: Setup, overhead: float) -> Memory:
    """Return the peak memory of a training step, the largest of three candidates.

    - At the head, all activations exist, with one chunk of logits and the gradient of the head.
    - At the last layer, the temporaries of its backward pass replace the chunk, and gradient checkpointing has
      recomputed the layer. In both, gradients exist only if the step has several micro-batches.
    - At the end of the backward pass, all gradients exist.

    One process accumulates gradients of the vocabulary matrices in place; several processes create one per use.
    `data` keeps gradients twice, in the buckets of DDP too. `full` keeps 1/N of weights, gradients and states. In
    the backward pass of a layer it gathers two layers and holds the gradient of one. At the head it gathers the
    head, with the embedding if they share a matrix. Early stopping, which copies the trained weights, and
    fragmentation are not included. `overhead` is the bytes of the process without the model.
    """
    full, sharded = setup.lora_rank is None, setup.sharding == "full"
    shards = setup.gpus if sharded else 1
    trained = trained_parameters(shape, setup.lora_rank)
    weights = 4 * (shape.parameters + (0 if full else trained)) / shards
    gradients = 4 * trained / shards * (2 if setup.sharding == "data" else 1)
    states = STATE_BYTES[setup.optimizer] * trained / shards
    gathered_layers = 4 * shape.layer * (3 if full else 2) if sharded else 0
    gathered_head = 4 * shape.head if sharded else 0
    head = 4 * shape.head if full else 0
    new_head = head if setup.sharding != "none" else 0
    first = new_head if setup.accumulates else head
    positions = setup.max_tokens_per_microbatch * 2 * pair.completion / pair.tokens
    chunk = 4 * min(setup.head_chunk, positions) * shape.vocabulary
    backward = setup.max_tokens_per_microbatch * (3 * setup.width * shape.intermediate + 2 * 4 * shape.hidden)
    kept = activations(shape, pair, setup)
    accumulated = gradients * setup.accumulates
    # FSDP reshards the head and its gradient before the layers, unless the embedding shares the matrix.
    shared = shape.tied or not sharded
    head_in_layers = (first + gathered_head) if shared else 0
    head_at_end = (2 * new_head if shape.tied else new_head) + (gathered_head if shared else 0)
    layer = layer_activations(shape, pair, setup) if setup.gradient_checkpointing else 0
    at_head = (accumulated, kept, gathered_head + first + chunk)
    at_last_layer = (accumulated, kept + layer, gathered_layers + head_in_layers + backward)
    at_end = (gradients, 0, gathered_layers + head_at_end + backward)
    gradients, kept, temporary = max(at_head, at_last_layer, at_end, key=sum)
    return Memory(weights, gradients, states, kept, temporary, overhead)


def reference_memory(shape: Shape, setup: Setup, overhead: float) -> Memory:
    """Return the peak memory of the reference pass, which keeps no activations and is not sharded.

    bf16 rounds the weights of one linear layer at a time.
    """
    copies = 0 if setup.precision == "fp32" else 2 * shape.hidden * shape.intermediate
    layer = setup.max_tokens_per_microbatch * (3 * setup.width * shape.intermediate + 3 * 4 * shape.hidden)
    chunk = 4 * setup.head_chunk * shape.vocabulary
    return Memory(4 * shape.parameters, 0, 0, 0, copies + max(layer, chunk), overhead)


def forward_flops(shape: Shape, tokens: int, projected: int, seen: int) -> tuple[int, int, int]:
    """Return the FLOPs of a forward pass as (layers, head, attention).

    The layers process `tokens` and the head `projected` tokens, with 2 FLOPs per weight. `seen` (query, key)
    positions attend, with 4 FLOPs per element of a query.
    """
    weights = sum(inputs * outputs for inputs, outputs in shape.matrices)
    attention = 4 * shape.layers * shape.query * seen
    return 2 * shape.layers * weights * tokens, 2 * shape.head * projected, attention


def pair_flops(shape: Shape, pair: Pair, setup: Setup | None) -> tuple[int, int]:
    """Return the FLOPs per pair as (layers, head), of training or, without `setup`, of the reference pass.

    Training has a forward pass, gradients of activations and gradients of weights (with LoRA only in attention).
    The head is recomputed, and with gradient checkpointing the layers too. Only matrix products count, without
    those of the LoRA adapters.
    """
    layers, head, attention = forward_flops(shape, pair.tokens, 2 * pair.completion, pair.seen)
    if setup is None:
        return layers + attention, head
    again = setup.gradient_checkpointing
    if setup.lora_rank is None:
        return (3 + again) * (layers + attention), 4 * head
    return (2 + again) * layers + (3 + again) * attention, 3 * head


def seconds(work: tuple[float, float], gpus: int, speed: tuple[float, float]) -> float:
    """Return the time of `work` in (layers, head) FLOPs at `speed` in FLOPs per second of each GPU."""
    return sum(part / (gpus * rate) for part, rate in zip(work, speed, strict=True))
