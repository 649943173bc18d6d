"""Estimate memory and hours of training on GPUs: `dpo plan --model llama-8b --gpus 8`.

Precision, tokens per micro-batch, pairs per step, optimizer, epochs and LoRA rank come from `params.yaml`.
"""

from collections.abc import Iterator

from dpo import planner
from dpo.common.errors import InputError
from dpo.config import Params, load_params
from dpo.engine.settings import GPU_HEAD_CHUNK
from dpo.planner import LLAMAS, Pair, Setup, Shape, Sharding

GPU_OVERHEAD = 1.5e9
"""Assumed bytes per process on a GPU without the model: CUDA context, libraries, workspaces."""
TFLOPS = (989.0, 494.0, 67.0)
"""Dense operations per second of an H100 SXM in bf16, TF32 and fp32, in 1e12, from its data sheet."""
UTILISATION = 0.35
"""Assumed share of these operations that training reaches. Measure it in a short run."""


def _named_shape(model: str) -> Shape:
    """Return the shape of a model by its name in `dpo.planner.LLAMAS`, its folder or its hub id."""
    if model in LLAMAS:
        return LLAMAS[model]
    from transformers import AutoConfig

    from dpo.engine.pretrained import load_weights

    try:
        return planner.shape_of(load_weights(AutoConfig, model))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: neither {', '.join(LLAMAS)} nor a model: {error}") from error


def candidate_setups(params: Params, pair: Pair, gpus: int, sharding: Sharding) -> Iterator[Setup]:
    """Yield setups for full training and LoRA, each without and with gradient checkpointing."""
    engine, dpo = params.engine, params.dpo
    for rank in (None, dpo.lora.rank if dpo.lora else 16):  # 16 if params.yaml has no LoRA
        for checkpointing in (False, True):
            yield Setup(
                # a pair that exceeds the limit is a micro-batch of its own
                max_tokens_per_microbatch=max(engine.max_tokens_per_microbatch, pair.tokens),
                precision=engine.precision,
                lora_rank=rank,
                gradient_checkpointing=checkpointing,
                accumulates=dpo.pairs_per_step * pair.tokens > gpus * engine.max_tokens_per_microbatch,
                optimizer=dpo.optimizer,
                sharding=sharding,
                gpus=gpus,
                head_chunk=GPU_HEAD_CHUNK,
            )


def plan(
    model: str, pair: Pair, pairs: int, gpus: int, gib: float, tflops: tuple[float, ...], utilisation: float
) -> None:
    """Print peak memory per GPU and hours for one policy. The arguments are those of `dpo plan`."""
    params, shape = load_params(), _named_shape(model)
    engine = params.engine
    bf16, tf32, fp32 = (peak * 1e12 * utilisation for peak in tflops)
    speed = (bf16, tf32) if engine.precision == "bf16" else (fp32, fp32)

    def row(name: str, checkpointing: str, memories: list[float], setup: Setup | None, passes: int) -> str:
        hours = passes * pairs * planner.seconds(planner.pair_flops(shape, pair, setup), gpus, speed) / 3600
        cells = [f"{memory / 2**30:.1f}" + " (too much)" * (memory > gib * 2**30) for memory in memories]
        return "| " + " | ".join([name, checkpointing, *cells, f"{hours:.2g}"]) + " |"

    kinds: dict[str, Sharding] = {"GiB": "none"} if gpus == 1 else {"GiB, DDP": "data", "GiB, FSDP": "full"}
    rows = list(zip(*(candidate_setups(params, pair, gpus, kind) for kind in kinds.values()), strict=True))
    scoring = planner.reference_memory(shape, rows[0][0], GPU_OVERHEAD).total
    print(
        f"{model}: {shape.parameters / 1e9:.2f} billion parameters; {pairs:,} pairs of {pair.tokens:,} tokens; "
        f"{engine.precision}, {engine.max_tokens_per_microbatch:,} tokens per micro-batch; GPUs: {gpus} with "
        f"{gib:.0f} GiB each, utilisation {utilisation:.0%}\n"
    )
    print("| " + " | ".join(["training", "checkpointing", *kinds, "hours"]) + " |")
    print("| --- | --- |" + " ---: |" * (len(kinds) + 1))
    print(row("reference pass", "", [scoring] * len(kinds), None, 1))
    for setups in rows:
        setup = setups[0]
        name = "all weights" if setup.lora_rank is None else f"LoRA, rank {setup.lora_rank}"
        memories = [planner.training_memory(shape, pair, each, GPU_OVERHEAD).total for each in setups]
        print(row(name, "on" if setup.gradient_checkpointing else "off", memories, setup, params.dpo.epochs))
