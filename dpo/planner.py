"""Estimates of peak GPU memory and hours of a training, from the shape of the model.

The formulas describe the engine: a packed stream of at most `max_tokens_per_microbatch` tokens; trained weights
and gradients in fp32 or bf16, optimizer states in fp32 or 8 bits; other weights in fp32, bf16 or NF4; products in
fp32 or bf16; logits in chunks of `HEAD_CHUNK` positions; reference log-probs from a cache. They hold for the Llama
architecture: grouped-query attention, a gated MLP or a mixture of experts with or without a shared expert, and two
RMSNorms per layer.
"""

from dataclasses import dataclass
from typing import Literal

from dpo.engine.flops import Shape, forward_flops
from dpo.engine.settings import HEAD_CHUNK, VOCABULARY_PART, Precision, Quantization

Sharding = Literal["none", "data", "full"]
"""`none`: one process. `data` (DDP): a replica per process. `full` (FSDP2): weights, gradients, states sharded."""

STATE_BYTES = {"adamw": 8, "rmsprop": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes of optimizer state per trained parameter. The 8-bit optimizers keep fp32 states of embeddings."""

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in NF4: 4 bits, an 8-bit scale per 64 weights, an fp32 scale per 256 of these scales."""
PLACES = 5
"""Integers of 8 bytes per active expert with which the copies of the tokens are sorted by expert and put back."""

LLAMAS = {
    "default": Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "llama-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "llama-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, tied=False),
}
"""The default model; Llama 3.2 1B, 3.1 8B and 3.1 70B (Grattafiori et al. 2024, table 3, and the model cards)."""

MIXTURES = {
    "qwen3-30b-a3b": Shape(48, 2048, 768, 32, 4, 128, 151936, tied=False, experts=128, active=8),
    "mixtral-8x7b": Shape(32, 4096, 14336, 32, 8, 128, 32000, tied=False, experts=8, active=2),
}
"""Qwen3-30B-A3B and Mixtral 8x7B (their configurations on the hub)."""


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
    gradient_checkpointing: bool | Literal["offload"] = False
    quantization: Quantization = None
    vocabulary: Precision = "fp32"
    accumulates: bool = True
    """Whether a step has several micro-batches. If so, gradients and all activations exist at the same time."""
    optimizer: str = "adamw"
    weights: Precision = "fp32"
    """Data type of the trained matrices of the layers and of their gradients."""
    sharding: Sharding = "none"
    gpus: int = 1
    head_chunk: int = HEAD_CHUNK
    """Positions per projection to the vocabulary."""

    @property
    def width(self) -> int:
        """Bytes per element of the layers."""
        return 4 if self.precision == "fp32" else 2

    @property
    def frozen_width(self) -> float:
        """Bytes per weight of a linear layer that is not trained."""
        return self.width if self.quantization is None else NF4_BYTES

    @property
    def vocabulary_width(self) -> int:
        """Bytes per weight of the embedding and the head, if they are not trained."""
        return 4 if self.vocabulary == "fp32" else 2


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
    return lora_rank * sum(kind.layers * kind.updates for kind in shape.kinds)


def frozen_weights(shape: Shape, setup: Setup) -> float:
    """Return the bytes of a model that is not trained. Norms and routers are fp32; experts are never in NF4."""
    experts = shape.expert_parameters
    linear = sum(kind.layers * kind.products for kind in shape.kinds) - experts
    vocabulary = (1 if shape.tied else 2) * shape.head
    others = 4 * (shape.parameters - linear - experts - vocabulary)
    return setup.frozen_width * linear + setup.width * experts + setup.vocabulary_width * vocabulary + others


def held_weights(shape: Shape, setup: Setup, models: int = 1) -> float:
    """Return the bytes of the weights of `models` that are not trained, while one of them computes.

    `full` keeps 1/N of each model and its gathered head, and gathers two layers at a time.
    """
    if setup.sharding != "full":
        return models * frozen_weights(shape, setup)
    gathered = models * setup.vocabulary_width * shape.head + 2 * setup.frozen_width * largest_layer(shape)
    return models * frozen_weights(shape, setup) / setup.gpus + gathered


def dequantised(shape: Shape, setup: Setup) -> float:
    """Return the bytes of the largest NF4 matrix in fp32 and in the precision of its product."""
    largest = max(inputs * outputs for kind in shape.kinds for inputs, outputs in kind.linear)
    return 0 if setup.quantization is None else (4 + setup.width) * largest


def largest_layer(shape: Shape) -> int:
    """Return the parameters of the largest layer."""
    return max(kind.layer for kind in shape.kinds)


def largest_matrix(shape: Shape) -> int:
    """Return the parameters of the largest tensor of a layer. The matrices of all experts are one tensor."""
    stacked = [shape.experts * inputs * outputs for inputs, outputs in shape.stacked]
    return max([inputs * outputs for kind in shape.kinds for inputs, outputs in kind.linear] + stacked)


def temporaries(shape: Shape, setup: Setup, outputs: int) -> int:
    """Return the bytes per token that exist only while a layer computes, with `outputs` fp32 hidden states.

    Each active expert has its own copy of the token. A shared expert computes before or after the others.
    """
    widths = [(kind.active, kind.intermediate) for kind in shape.kinds] + [(1, shape.shared)]
    return max(copies * (3 * setup.width * width + outputs * 4 * shape.hidden) for copies, width in widths)


def head_chunk(shape: Shape, setup: Setup, positions: float) -> float:
    """Return the bytes of a chunk of logits, with the part of a bf16 vocabulary that is cast to fp32."""
    cast = 0 if setup.vocabulary == "fp32" else 4 * min(VOCABULARY_PART, shape.vocabulary) * shape.hidden
    return 4 * min(setup.head_chunk, positions) * shape.vocabulary + cast


def layer_activations(shape: Shape, pair: Pair, setup: Setup) -> float:
    """Return the bytes that a layer keeps for its backward pass, and in bf16 those of its rounded trained weights.

    Norms keep their input and, if their weight is trained, the normalised input, in fp32. Linear layers keep their
    inputs: in fp32 one tensor for q, k and v and one for gate and up, in bf16 a rounded copy for each of the five.
    Attention keeps queries, keys and values (repeated per query head), its output before and after the transpose,
    the log-sum-exp, and for the second completion the keys and values of prompt and completion with a mask. The
    MLP keeps gate, its activation, up and their product. LoRA keeps the inner vector of each update.

    In a mixture, each active expert has its own copy of the token, with the same parts of the MLP and its output
    before the weighting. The router keeps its input, its probabilities and the places of the copies. With LoRA,
    the sum of the weights of all experts and their updates is kept, and in bf16 rounded factors of the updates. A
    shared expert keeps what an MLP keeps, and its output before the weighting by its gate.
    """
    fp32, full = setup.precision == "fp32", setup.lora_rank is None
    copies = full and not fp32 and setup.weights == "fp32"
    norms = 2 * 4 * shape.hidden * (2 if full else 1)
    again = (pair.prompt + pair.completion) / pair.tokens
    mask = setup.width * pair.completion * (pair.prompt + pair.completion) / pair.tokens
    attention = setup.width * shape.query * (5 + 2 * again) + 4 * shape.heads + mask
    mlp = shape.active * 4 * setup.width * shape.intermediate
    rank, summed = setup.lora_rank or 0, 0
    if shape.experts:
        inputs = setup.width * shape.hidden * ((2 if fp32 else 4) + 2 * shape.active)
        mlp += 4 * shape.experts + 8 * PLACES * shape.active
        if rank:
            factors = 0 if fp32 else rank * sum(sum(sizes) for sizes in shape.stacked)
            summed = setup.width * shape.experts * (shape.expert + factors)
        if shape.shared:
            inputs += setup.width * shape.hidden * (1 if fp32 else 4)
            mlp += 4 * setup.width * shape.shared
    else:
        inputs = setup.width * shape.hidden * (2 if fp32 else 5)
    per_token = norms + inputs + attention + mlp + setup.width * len(shape.linear) * rank
    return setup.max_tokens_per_microbatch * per_token + (2 * shape.layer if copies else 0) + summed


def activations(shape: Shape, pair: Pair, setup: Setup) -> float:
    """Return the bytes that the forward pass of one micro-batch keeps for the backward pass.

    With gradient checkpointing each layer keeps its input only, on the device or, with `offload`, on the host,
    except for the layer that is computed. After the layers, the last norm and the hidden states of the completions
    are kept.
    """
    kept = setup.max_tokens_per_microbatch * 4 * shape.hidden
    norm = 2 if setup.lora_rank is None else 1
    layers: float = kept * (1 if setup.gradient_checkpointing == "offload" else shape.layers)
    if not setup.gradient_checkpointing:
        layers = sum(kind.layers * layer_activations(kind, pair, setup) for kind in shape.kinds)
    return layers + kept * (norm + 2 * pair.completion / pair.tokens)


def training_memory(shape: Shape, pair: Pair, setup: Setup, overhead: float) -> Memory:
    """Return the peak memory of a training step, the largest of four candidates.

    - At the head, all activations exist, with one chunk of logits and the gradient of the head.
    - At the last layer, the temporaries of its backward pass replace the chunk, and gradient checkpointing has
      recomputed the layer. In both, gradients exist only if the step has several micro-batches.
    - At the end of the backward pass, all gradients exist.
    - In the optimizer step, a bf16 matrix, its gradient and its random numbers exist in 32 bits.

    One process accumulates gradients of the vocabulary matrices in place; several processes create one per use.
    `data` keeps gradients twice, in the buckets of DDP too. `full` keeps 1/N of weights, gradients and states. In
    the backward pass of a layer it gathers two layers and holds the gradient of one. At the head it gathers the
    head, with the embedding if they share a matrix; a head that is not trained also stays in the buffer of the
    all-gather. Early stopping, which copies the trained weights, and fragmentation are not included. `overhead` is
    the bytes of the process without the model.
    """
    full, sharded = setup.lora_rank is None, setup.sharding == "full"
    shards = setup.gpus if sharded else 1
    trained = trained_parameters(shape, setup.lora_rank)
    products = sum(kind.layers * kind.products for kind in shape.kinds)
    saved = 2 * products if full and setup.weights == "bf16" else 0
    base = 4 * shape.parameters - saved if full else frozen_weights(shape, setup)
    weights = (base + (0 if full else 4 * trained)) / shards
    gradients = (4 * trained - saved) / shards * (2 if setup.sharding == "data" else 1)
    states: float = STATE_BYTES[setup.optimizer] * trained / shards
    if full and "8bit" in setup.optimizer:
        states += (8 - STATE_BYTES[setup.optimizer]) * shape.head / shards
    gathered_layers = (4 * 3 if full else setup.frozen_width * 2) * largest_layer(shape) if sharded else 0
    gathered_head = (4 if full else setup.vocabulary_width) * shape.head if sharded else 0
    head = 4 * shape.head if full else 0
    new_head = head if setup.sharding != "none" else 0
    first = new_head if setup.accumulates else head
    chunk = head_chunk(shape, setup, setup.max_tokens_per_microbatch * 2 * pair.completion / pair.tokens)
    backward = setup.max_tokens_per_microbatch * temporaries(shape, setup, 2) + dequantised(shape, setup)
    if shape.experts:  # the gradient of the matrices of all experts, rounded and in fp32
        both = setup.width + (4 if full and setup.precision == "bf16" else 0)
        backward += both * largest_matrix(shape)
    kept = activations(shape, pair, setup)
    accumulated = gradients * setup.accumulates
    # FSDP reshards the head and its gradient before the layers, unless the embedding shares the matrix.
    shared = shape.tied or not sharded
    head_in_layers = (first + gathered_head) if shared else 0
    head_at_end = (2 * new_head if shape.tied else new_head) + (gathered_head if shared else 0)
    layers = [layer_activations(kind, pair, setup) for kind in shape.kinds]
    layer = max(layers) if setup.gradient_checkpointing else 0
    buffer = 0 if full else gathered_head  # of the all-gather; kept with the gathered head until the next one
    at_head = (accumulated, kept, buffer + gathered_head + first + chunk)
    at_last_layer = (accumulated, kept + layer, gathered_layers + buffer + head_in_layers + backward)
    at_end = (gradients, 0, gathered_layers + head_at_end + backward)
    at_step = (gradients, 0, 12 * largest_matrix(shape) if saved else 0)
    gradients, kept, temporary = max(at_head, at_last_layer, at_end, at_step, key=sum)
    return Memory(weights, gradients, states, kept, temporary, overhead)


def reference_memory(shape: Shape, setup: Setup, overhead: float, models: int = 1, kl: bool = False) -> Memory:
    """Return the peak memory of a pass without gradients, which keeps no activations.

    `models` are in memory. The KL divergence has six matrices of the size of a chunk: logits and log-probs of
    policy and reference, probabilities and differences.
    """
    layer = setup.max_tokens_per_microbatch * temporaries(shape, setup, 3)
    chunk = head_chunk(shape, setup, setup.max_tokens_per_microbatch) * (6 if kl else 1)
    weights = held_weights(shape, setup, models)
    return Memory(weights, 0, 0, 0, max(layer + dequantised(shape, setup), chunk), overhead)


def keys_and_values(shape: Shape, tokens: float, width: int) -> float:
    """Return the bytes of the keys and values of `tokens` tokens, with `width` bytes per element."""
    return tokens * shape.layers * 2 * shape.kv_heads * shape.head_dim * width


def sampling_memory(
    shape: Shape, setup: Setup, overhead: float, prompt: int, new_tokens: int, max_tokens_per_batch: int
) -> Memory:
    """Return the peak memory of sampling: keys and values in fp32, and a batch of prompts or its logits.

    A batch has at most `max_tokens_per_batch` tokens of prompts and responses.
    """
    rows = max(1, max_tokens_per_batch // (prompt + new_tokens))
    cache = keys_and_values(shape, rows * (prompt + new_tokens), 4)
    prompts = rows * prompt * temporaries(shape, setup, 3)
    logits = 4 * 4 * rows * shape.vocabulary
    temporary = max(prompts + dequantised(shape, setup), logits)
    return Memory(held_weights(shape, setup), 0, 0, cache, temporary, overhead)


def pair_flops(shape: Shape, pair: Pair, setup: Setup | None) -> tuple[int, int]:
    """Return the FLOPs per pair as (layers, head), of training or, without `setup`, of the reference pass.

    Training has a forward pass, gradients of activations and gradients of weights (with LoRA only in attention).
    The head is recomputed, and with gradient checkpointing the layers too. Only matrix products count, without
    those of the LoRA adapters.
    """
    layers, head, attention = forward_flops(shape, pair.tokens, 2 * pair.completion, pair.seen)
    if setup is None:
        return layers + attention, head
    again = bool(setup.gradient_checkpointing)
    if setup.lora_rank is None:
        return (3 + again) * (layers + attention), 4 * head
    return (2 + again) * layers + (3 + again) * attention, 3 * head


def seconds(work: tuple[float, float], gpus: int, speed: tuple[float, float]) -> float:
    """Return the time of `work` in (layers, head) FLOPs at `speed` in FLOPs per second of each GPU."""
    return sum(part / (gpus * rate) for part, rate in zip(work, speed, strict=True))
