"""What a training would take: peak memory of a GPU and hours, from shapes alone.

The formulas follow what the engine does: one packed stream of at most `max_tokens_per_microbatch` tokens, weights,
gradients and optimizer states in fp32, matrix products of the layers in fp32 or bf16, the vocabulary in fp32 in
chunks of `HEAD_CHUNK` positions, reference log-probs from a cache. They hold for models built as Llama is:
grouped-query attention, a gated MLP, two RMSNorms a layer.
"""

from dataclasses import dataclass
from typing import Any, Literal

from dpo.common.errors import InputError
from dpo.engine.head import HEAD_CHUNK
from dpo.engine.settings import Precision

Sharding = Literal["none", "data", "full"]
"""`none`: one process; `data`: a whole model in each process; `full`: weights, gradients and states in shards."""

STATE_BYTES = {"adamw": 8, "rmsprop": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer state for each trained parameter."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output shares its matrix with the input embeddings."""

    @property
    def query(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_dim

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's seven linear maps: q, k, v, o, gate, up, down."""
        hidden, query, key = self.hidden, self.query, self.kv_heads * self.head_dim
        attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
        return [*attention, *[(hidden, self.intermediate)] * 2, (self.intermediate, hidden)]

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices) + 2 * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the projection to the vocabulary."""
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Parameters outside of the layers: embeddings, last norm, head."""
        return (1 if self.tied else 2) * self.head + self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.outside


LLAMAS = {
    "llama-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "llama-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, tied=False),
}
"""Of Llama 3.2 1B, Llama 3.1 8B and Llama 3.1 70B (Grattafiori et al. 2024, table 3, and the model cards)."""


def shape_of(config: Any) -> Shape:
    """The shape that a transformers config tells.

    Raises:
        InputError: a size is missing, or it has experts; the model is not built as Llama is.
    """
    if any("expert" in name and not name.startswith("_") for name in vars(config)):
        raise InputError(f"no plan for a model with experts, '{config.model_type}'; plan with a Llama of its size")
    try:
        heads, hidden = config.num_attention_heads, config.hidden_size
        return Shape(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
        )
    except AttributeError as error:
        raise InputError(
            f"no plan for a model of type '{config.model_type}': {error}; plan with a Llama of its size"
        ) from error


@dataclass(frozen=True)
class Pair:
    """The mean length of a pair, in tokens."""

    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        """Positions in the stream: the prompt once, two completions."""
        return self.prompt + 2 * self.completion

    @property
    def seen(self) -> int:
        """(query, key) positions that see each other."""
        prompt, completion = self.prompt, self.completion
        return prompt * (prompt + 1) // 2 + completion * (completion + 1) + 2 * prompt * completion


@dataclass(frozen=True)
class Setup:
    """How a model is trained."""

    max_tokens_per_microbatch: int
    """Tokens in a micro-batch of one GPU."""
    precision: Precision = "fp32"
    lora_rank: int | None = None
    """Of the adapters; None trains all weights."""
    gradient_checkpointing: bool = False
    accumulates: bool = True
    """Whether a step has several micro-batches: gradients are then there beside all activations."""
    optimizer: str = "adamw"
    sharding: Sharding = "none"
    gpus: int = 1
    head_chunk: int = HEAD_CHUNK
    """Positions projected to the vocabulary at a time."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float
    """Chunks of logits, the head's gradient, gathered layers, communication."""
    overhead: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def trained_parameters(shape: Shape, lora_rank: int | None) -> int:
    """Parameters that have gradients and optimizer states."""
    if lora_rank is None:
        return shape.parameters
    return shape.layers * lora_rank * sum(inputs + outputs for inputs, outputs in shape.matrices)


def layer_activations(shape: Shape, pair: Pair, setup: Setup) -> float:
    """Bytes that a layer keeps for its backward pass, for each token of the stream.

    Each norm keeps its input and, where its weight is trained, the normalised input, in fp32. The linear maps
    keep their inputs: in fp32 one tensor for q, k and v and one for gate and up, in bf16 a rounded copy for each
    of the five. Attention keeps queries, keys and values (these repeated for each query head), its output twice,
    as it comes and as the next map takes it, the log-sum-exp, and for the second completion a copy of the keys
    and values of prompt and completion with a mask. The MLP keeps gate, its activation, up and their product.
    LoRA keeps the inner vector of each of the seven updates.
    """
    width = 4 if setup.precision == "fp32" else 2
    full = setup.lora_rank is None
    norms = 2 * 4 * shape.hidden * (2 if full else 1)
    inputs = width * shape.hidden * (2 if setup.precision == "fp32" else 5)
    again = (pair.prompt + pair.completion) / pair.tokens
    mask = width * pair.completion * (pair.prompt + pair.completion) / pair.tokens
    attention = width * shape.query * (5 + 2 * again) + 4 * shape.heads + mask
    mlp = 4 * width * shape.intermediate
    return norms + inputs + attention + mlp + width * 7 * (setup.lora_rank or 0)


def recomputed_layer(shape: Shape, pair: Pair, setup: Setup) -> float:
    """Return the bytes of one layer in its backward pass: its activations, and in bf16 its rounded weights."""
    copies = 0 if setup.precision == "fp32" else 2 * shape.layer
    return setup.max_tokens_per_microbatch * layer_activations(shape, pair, setup) + copies


def activations(shape: Shape, pair: Pair, setup: Setup) -> float:
    """Return the bytes that the forward pass of one micro-batch keeps for the backward pass.

    With gradient checkpointing each layer keeps its input only. After the layers, the last norm and the hidden
    states of the completions are kept.
    """
    kept = setup.max_tokens_per_microbatch * 4 * shape.hidden
    layer = kept if setup.gradient_checkpointing else recomputed_layer(shape, pair, setup)
    completions = 2 * pair.completion / pair.tokens
    norm = 2 if setup.lora_rank is None else 1
    return shape.layers * layer + kept * (norm + completions)


def training_memory(shape: Shape, pair: Pair, setup: Setup, overhead: float) -> Memory:
    """Bytes at the peak of a step of each GPU.

    There are three candidates, and the largest counts. At the head all activations exist, with one chunk of logits
    and the gradient of the head's matrix. At the last layer, whose backward pass comes next, the temporaries of
    that pass replace the chunk, and gradient checkpointing has recomputed the layer. In both, earlier gradients
    exist only if the step has several micro-batches. At the end of the backward pass all gradients exist. One
    process adds the gradient of the vocabulary matrices in place; several processes make a new one for each use.

    Assumes: `data` keeps the gradients a second time, in the buckets of DDP. `full` (FSDP2) keeps 1/N of weights,
    gradients and states. During a layer's backward pass it gathers two layers and holds the gradient of one;
    during the projection to the vocabulary it gathers the head instead, and the embedding with it if they share a
    matrix. No early stopping, which keeps another copy of the trained weights. No fragmentation of the allocator.

    Args:
        shape: of the model.
        pair: mean lengths; they decide what share of the stream is completions.
        setup: how it is trained.
        overhead: bytes of the process without the model: libraries, the CUDA context.
    """
    full = setup.lora_rank is None
    shards = setup.gpus if setup.sharding == "full" else 1
    trained = trained_parameters(shape, setup.lora_rank)
    weights = 4 * (shape.parameters + (0 if full else trained)) / shards
    gradients = 4 * trained / shards * (2 if setup.sharding == "data" else 1)
    states = STATE_BYTES[setup.optimizer] * trained / shards
    sharded = setup.sharding == "full"
    gathered_layers = 4 * shape.layer * (3 if full else 2) if sharded else 0
    gathered_head = 4 * shape.head if sharded else 0
    head = 4 * shape.head if full else 0
    new_head = head if setup.sharding != "none" else 0
    first = new_head if setup.accumulates else head
    positions = setup.max_tokens_per_microbatch * 2 * pair.completion / pair.tokens
    chunk = 4 * min(setup.head_chunk, positions) * shape.vocabulary
    width = 4 if setup.precision == "fp32" else 2
    backward = setup.max_tokens_per_microbatch * (3 * width * shape.intermediate + 2 * 4 * shape.hidden)
    kept = activations(shape, pair, setup)
    accumulated = gradients * setup.accumulates
    # FSDP shards the head and its gradient again before the layers, unless the embedding shares the matrix.
    shared = shape.tied or not sharded
    head_in_layers = (first + gathered_head) if shared else 0
    head_at_end = (2 * new_head if shape.tied else new_head) + (gathered_head if shared else 0)
    layer = recomputed_layer(shape, pair, setup) if setup.gradient_checkpointing else 0

    def memory(gradients: float, activations: float, temporary: float) -> Memory:
        return Memory(weights, gradients, states, activations, temporary, overhead)

    at_head = memory(accumulated, kept, gathered_head + first + chunk)
    at_last_layer = memory(accumulated, kept + layer, gathered_layers + head_in_layers + backward)
    at_end = memory(gradients, 0, gathered_layers + head_at_end + backward)
    return max(at_head, at_last_layer, at_end, key=lambda memory: memory.total)


def reference_memory(shape: Shape, setup: Setup, overhead: float) -> Memory:
    """Bytes at the peak of the reference pass, which holds a whole model and keeps no activations.

    bf16 rounds the weights of one linear map at a time.
    """
    width = 4 if setup.precision == "fp32" else 2
    copies = 0 if setup.precision == "fp32" else 2 * shape.hidden * shape.intermediate
    layer = setup.max_tokens_per_microbatch * (3 * width * shape.intermediate + 3 * 4 * shape.hidden)
    chunk = 4 * setup.head_chunk * shape.vocabulary
    return Memory(4 * shape.parameters, 0, 0, 0, copies + max(layer, chunk), overhead)


def forward_flops(shape: Shape, tokens: int, projected: int, seen: int) -> tuple[int, int, int]:
    """(layers, head, attention) operations of a forward pass.

    Args:
        shape: of the model.
        tokens: in the layers; each takes two operations for a weight.
        projected: to the vocabulary.
        seen: (query, key) pairs that see each other; each takes four operations for a query's element.
    """
    weights = sum(inputs * outputs for inputs, outputs in shape.matrices)
    attention = 4 * shape.layers * shape.query * seen
    return 2 * shape.layers * weights * tokens, 2 * shape.head * projected, attention


def pair_flops(shape: Shape, pair: Pair, setup: Setup | None) -> tuple[int, int]:
    """(layers, head) operations that a pair takes in training, or without `setup` in the reference pass.

    Training takes the forward pass, the gradients of activations and those of weights, which LoRA has in attention
    alone; the head is computed once more (but for its last chunk, which is counted all the same), the layers are
    with gradient checkpointing. LoRA's own products, norms and all else but matrix products count as nothing.
    """
    layers, head, attention = forward_flops(shape, pair.tokens, 2 * pair.completion, pair.seen)
    if setup is None:
        return layers + attention, head
    again = setup.gradient_checkpointing
    if setup.lora_rank is None:
        return (3 + again) * (layers + attention), 4 * head
    return (2 + again) * layers + (3 + again) * attention, 3 * head


def seconds(work: tuple[float, float], gpus: int, speed: tuple[float, float]) -> float:
    """Time of (layers, head) operations.

    Args:
        work: from `pair_flops`, times the number of pairs.
        gpus: that share it.
        speed: operations a second of one GPU, communication included, in the layers and in the head.
    """
    return sum(part / (gpus * rate) for part, rate in zip(work, speed, strict=True))
