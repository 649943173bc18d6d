"""Estimate memory and hours of the stages on GPUs: `dpo plan --model llama-8b --gpus 8`.

Settings come from `params.yaml`, or from the file that `--params` names.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dpo import planner
from dpo.common.errors import InputError
from dpo.config import Params, load_params
from dpo.data.reasoning import reasoning_problems
from dpo.engine.flops import Shape, checked_shape
from dpo.planner import LLAMAS, MIXTURES, Pair, Setup, Sharding
from dpo.training.settings import LoraSettings
from tasks.common.memory import (
    GPU_OVERHEAD,
    STAGES,
    Hardware,
    advice,
    experts_note,
    sampler_note,
    stage_memory,
    trained_adapter,
    training_setup,
)
from tasks.common.paths import BASE, RAW_PAIRS

TFLOPS = (989.0, 494.0, 67.0)
"""Dense operations per second of an H100 SXM in bf16, TF32 and fp32, in 1e12, from its data sheet."""
UTILISATION = 0.35
"""Assumed share of these operations that training reaches. Measure it in a short run."""
ASSUMED_PAIRS = 100_000
"""Number of training pairs if the source cannot be counted without a download."""


@dataclass(frozen=True)
class Speed:
    """Operations per second of a GPU in bf16, TF32 and fp32, and the share of them that is reached."""

    tflops: tuple[float, float, float] = TFLOPS
    utilisation: float = UTILISATION

    def of(self, params: Params) -> tuple[float, float]:
        """Return FLOP/s of layers and head in the precision of the engine."""
        bf16, tf32, fp32 = (peak * 1e12 * self.utilisation for peak in self.tflops)
        return (bf16, tf32) if params.engine.precision == "bf16" else (fp32, fp32)


def _named_shape(model: str) -> Shape:
    """Return the shape of a model by its name in the planner, its folder or its hub id."""
    named = {**LLAMAS, **MIXTURES}
    if model in named:
        return named[model]
    from transformers import AutoConfig

    from dpo.engine.pretrained import load_weights

    try:
        return checked_shape(load_weights(AutoConfig, model))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: neither {', '.join(named)} nor a model: {error}") from error


def candidate_setups(params: Params, pair: Pair, gpus: int, sharding: Sharding) -> Iterator[Setup]:
    """Yield setups for full training and LoRA, each without and with gradient checkpointing."""
    hardware = Hardware(gpus, sharding)
    for lora in (None, params.dpo.lora or LoraSettings(rank=16, alpha=32)):
        for checkpointing in (False, True):
            training = replace(params.dpo, gradient_checkpointing=checkpointing)
            yield training_setup(params, training, lora, pair, hardware)


def count_pairs(params: Params) -> int | None:
    """Return the rows of `data.source`, or None if they cannot be counted without a download."""
    sources = params.data.sources
    if [source.path for source in sources] == ["arithmetic"]:
        return params.data.arithmetic.problems
    if problems := reasoning_problems(params.data, params.seed):
        return problems.problems
    if all(source.path not in (None, "default") for source in sources):
        from dpo.data.readers import read_files

        names = [str(source.path) for source in sources]
        counts = [sum(1 for _ in read_files([name])) for name in names]
        return round(sum(n * source.share for n, source in zip(counts, sources, strict=True)))
    if [source.path for source in sources] == ["default"] and RAW_PAIRS.is_file():
        from pyarrow import parquet

        return int(parquet.read_metadata(RAW_PAIRS).num_rows)
    return None


def stage_hours(stage: str, params: Params, shape: Shape, pair: Pair, pairs: int, gpus: int, speed: Speed) -> str:
    """Return the hours of a stage. Those of sampling depend on the memory's speed and are not planned."""
    if stage in ("reference_samples", "evaluate"):
        return ""
    setup, passes = None, 1
    if stage != "reference_logprobs":
        settings = params.sft if stage == "sft" else params.dpo
        assert settings is not None
        pairs = min(pairs, (params.sft and stage == "sft" and params.sft.max_pairs) or pairs)
        adapter = trained_adapter(params, settings)
        setup, passes = training_setup(params, settings, adapter, pair, Hardware(gpus)), settings.epochs
    flops = planner.pair_flops(shape, pair, setup)
    return f"{passes * pairs * planner.seconds(flops, gpus, speed.of(params)) / 3600:.2g}"


def plan(
    model: str | None, file: Path, pair: Pair, pairs: int | None, gpus: int, gib: float, speed: Speed
) -> None:
    """Print peak memory per GPU and hours of each stage. The arguments are those of `dpo plan`."""
    params = load_params(file)
    model = model or (str(BASE) if (BASE / "config.json").is_file() else params.model.base)
    shape, counted = _named_shape(model), pairs or count_pairs(params)
    train = pairs or min(counted or ASSUMED_PAIRS, params.data.max_train_pairs or counted or ASSUMED_PAIRS)
    kinds: dict[str, Sharding] = {"GiB": "none"} if gpus == 1 else {"GiB, DDP": "data", "GiB, FSDP": "full"}
    engine, active = params.engine, shape.active_parameters
    print(
        f"{model}: {shape.parameters / 1e9:.2f} billion parameters"
        f"{f' ({active / 1e9:.2f} active)' if shape.experts else ''}; {train:,} pairs"
        f"{'' if counted else ' (assumed)'} of {pair.tokens:,} tokens; {engine.precision}, "
        f"{engine.max_tokens_per_microbatch:,} tokens per micro-batch; GPUs: {gpus} with {gib:.0f} GiB each, "
        f"utilisation {speed.utilisation:.0%}\n"
    )

    def cell(memory: float) -> str:
        return f"{memory / 2**30:.1f}" + " (too much)" * (memory > gib * 2**30)

    _heading(["stage", *kinds, "hours"])
    too_large = []
    for stage in STAGES:
        hardware = [Hardware(gpus, kind) for kind in kinds.values()]
        memories = [stage_memory(stage, params, shape, pair, each) for each in hardware]
        if None in memories:
            print(f"| {stage} |" + " 0 |" * len(kinds) + " 0 |")
            continue
        totals = [memory.total for memory in memories if memory]
        hours = stage_hours(stage, params, shape, pair, train, gpus, speed)
        print("| " + " | ".join([stage, *map(cell, totals), hours]) + " |")
        if min(totals) > gib * 2**30:
            too_large.append(f"{stage}: {advice(stage, params, shape, pair, hardware[-1], gib * 2**30)}")
    notes = filter(None, [*too_large, experts_note(params, shape), sampler_note(params, shape, gib)])
    print("\n" + "".join(f"{line}\n" for line in notes))
    _heading(["training", "checkpointing", *kinds, "hours"])
    rows = zip(*(candidate_setups(params, pair, gpus, kind) for kind in kinds.values()), strict=True)
    for setups in rows:
        setup = setups[0]
        name = "all weights" if setup.lora_rank is None else f"LoRA, rank {setup.lora_rank}"
        totals = [planner.training_memory(shape, pair, each, GPU_OVERHEAD).total for each in setups]
        seconds = planner.seconds(planner.pair_flops(shape, pair, setup), gpus, speed.of(params))
        hours = f"{params.dpo.epochs * train * seconds / 3600:.2g}"
        checkpointing = "on" if setup.gradient_checkpointing else "off"
        print("| " + " | ".join([name, checkpointing, *map(cell, totals), hours]) + " |")


def _heading(names: list[str]) -> None:
    print("| " + " | ".join(names) + " |")
    texts = sum(name in ("stage", "training", "checkpointing") for name in names)
    print("|" + " --- |" * texts + " ---: |" * (len(names) - texts))
