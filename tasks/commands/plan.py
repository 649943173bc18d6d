"""Plan memory and hours of a training: `python -m tasks.commands.plan --model llama-8b --gpus 8`.

`params.yaml` says how the model would be trained: precision, tokens in a micro-batch, pairs in a step, optimizer,
epochs, rank of the adapters.
"""

import argparse
import sys
from collections.abc import Iterator

from transformers import AutoConfig

from dpo.common.errors import InputError
from dpo.config import Params, load_params
from dpo.engine.head import GPU_HEAD_CHUNK
from dpo.engine.pretrained import load_weights
from dpo.planner import (
    LLAMAS,
    Pair,
    Setup,
    Shape,
    Sharding,
    pair_flops,
    reference_memory,
    seconds,
    shape_of,
    training_memory,
)
from tasks.common.runner import run

GPU_OVERHEAD = 1.5e9
"""Bytes of a process on a GPU without the model: CUDA context, libraries, workspaces. An assumption."""

TFLOPS = (989.0, 494.0, 67.0)
"""Dense operations a second of an H100 SXM in bf16, TF32 and fp32, in 1e12, as its data sheet has them."""

UTILISATION = 0.35
"""Share of these operations that a training reaches. An assumption; a short run of one's own tells."""

RANK = 16
"""Of the adapters, where params.yaml has none."""


def named_shape(model: str) -> Shape:
    """The shape of a model, by its name in `dpo.planner.LLAMAS`, its folder or its hub id.

    Raises:
        InputError: there is no such model, or it is not built as Llama is.
    """
    if model in LLAMAS:
        return LLAMAS[model]
    try:
        return shape_of(load_weights(AutoConfig, model))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: neither {', '.join(LLAMAS)} nor a model: {error}") from error


def ways(params: Params, pair: Pair, gpus: int, sharding: Sharding) -> Iterator[Setup]:
    """All weights and adapters, each without and with gradient checkpointing."""
    engine, dpo = params.engine, params.dpo
    for rank in (None, dpo.lora.rank if dpo.lora else RANK):
        for checkpointing in (False, True):
            yield Setup(
                max_tokens_per_microbatch=max(
                    engine.max_tokens_per_microbatch, pair.tokens
                ),  # a longer pair stands alone
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
    shape: Shape, params: Params, pair: Pair, pairs: int, gpus: int, speed: tuple[float, float], room: float
) -> str:
    """Peak memory of a GPU and hours of one policy, as a table.

    Args:
        shape: of the model.
        params: how it is trained.
        pair: mean lengths.
        pairs: in the training data.
        gpus: that share the work.
        speed: operations a second of one GPU in the layers and in the head, as far as they are used.
        room: bytes of memory of one GPU.
    """

    def line(name: str, checkpointing: str, memories: list[float], setup: Setup | None, passes: int) -> str:
        work = pair_flops(shape, pair, setup)
        hours = passes * pairs * seconds(work, gpus, speed) / 3600
        cells = [f"{memory / 2**30:.1f}" + " (too much)" * (memory > room) for memory in memories]
        return "| " + " | ".join([name, checkpointing, *cells, f"{hours:.2g}"]) + " |"

    kinds: dict[str, Sharding] = {"GiB": "none"} if gpus == 1 else {"GiB, DDP": "data", "GiB, FSDP": "full"}
    head = ["training", "checkpointing", *kinds, "hours"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(kinds) + 1)]
    setups = list(zip(*(ways(params, pair, gpus, kind) for kind in kinds.values()), strict=True))
    scoring = reference_memory(shape, setups[0][0], GPU_OVERHEAD).total
    lines.append(line("reference pass", "", [scoring] * len(kinds), None, 1))
    for each in setups:
        setup = each[0]
        lines.append(
            line(
                "all weights" if setup.lora_rank is None else f"LoRA, rank {setup.lora_rank}",
                "on" if setup.gradient_checkpointing else "off",
                [training_memory(shape, pair, one, GPU_OVERHEAD).total for one in each],
                setup,
                params.dpo.epochs,
            )
        )
    return "\n".join(lines)


def main() -> None:
    """Read, plan, print."""
    parser = argparse.ArgumentParser(prog="python -m tasks.commands.plan", description=__doc__)
    parser.add_argument("--model", required=True, help=f"a folder, a hub id, or one of {', '.join(LLAMAS)}")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of each (80)")
    parser.add_argument("--pairs", type=int, default=100_000, help="in the training data (100,000)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="mean of a prompt (256)")
    parser.add_argument("--completion-tokens", type=int, default=256, help="mean of a completion (256)")
    parser.add_argument(
        "--tflops", type=float, nargs=3, default=TFLOPS, help="1e12 operations a second: in bf16, in TF32, in fp32"
    )
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help=f"share of it ({UTILISATION})")
    asked = parser.parse_args()
    params, shape = load_params(), named_shape(asked.model)
    pair = Pair(asked.prompt_tokens, asked.completion_tokens)
    bf16, tf32, fp32 = (peak * 1e12 * asked.utilisation for peak in asked.tflops)
    speed = (bf16, tf32) if params.engine.precision == "bf16" else (fp32, fp32)
    sys.stdout.write(
        f"{asked.model}: {shape.parameters / 1e9:.2f} billion parameters; {asked.pairs:,} pairs of "
        f"{pair.tokens:,} tokens; {params.engine.precision}, {params.engine.max_tokens_per_microbatch:,} tokens "
        f"in a micro-batch; GPUs: {asked.gpus}, each of {asked.gpu_memory:.0f} GiB, {asked.utilisation:.0%} of "
        "its operations used\n\n"
    )
    room = asked.gpu_memory * 2**30
    sys.stdout.write(plan(shape, params, pair, asked.pairs, asked.gpus, speed, room) + "\n")


if __name__ == "__main__":
    run(main)
