"""Planned memory of the stages that run a model. A stage that cannot fit stops before it loads the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo import planner
from dpo.common.errors import InputError
from dpo.config import Params
from dpo.engine.flops import Shape, checked_shape
from dpo.engine.settings import GPU_HEAD_CHUNK, HEAD_CHUNK
from dpo.planner import Memory, Pair, Setup, Sharding
from dpo.training.settings import DpoSettings, LoraSettings, OptimizerSettings, SftSettings

STAGES = ("sft", "reference_logprobs", "reference_samples", "train", "evaluate")
"""The stages that run a model."""

GPU_OVERHEAD, CPU_OVERHEAD = 1.5e9, 0.5e9
"""Assumed bytes per process without the model: libraries, and on a GPU the CUDA context and workspaces."""

TYPICAL = Pair(prompt=256, completion=256)
"""Lengths of a pair if the data is unknown."""


@dataclass(frozen=True)
class Hardware:
    """Processes of a stage."""

    gpus: int = 1
    sharding: Sharding = "none"
    on_gpu: bool = True

    @property
    def overhead(self) -> float:
        """Bytes of a process without the model."""
        return GPU_OVERHEAD if self.on_gpu else CPU_OVERHEAD

    @property
    def head_chunk(self) -> int:
        """Positions per projection to the vocabulary."""
        return GPU_HEAD_CHUNK if self.on_gpu else HEAD_CHUNK


def training_setup(
    params: Params, training: OptimizerSettings, lora: LoraSettings | None, pair: Pair, hardware: Hardware
) -> Setup:
    """Return the planner's setup of a training."""
    engine, step = params.engine, training.pairs_per_step * pair.tokens / hardware.gpus
    budget = max(engine.max_tokens_per_microbatch, pair.tokens)  # a longer pair is a micro-batch of its own
    return Setup(
        max_tokens_per_microbatch=int(max(pair.tokens, min(budget, step))),
        precision=engine.precision,
        lora_rank=lora.rank if lora else None,
        gradient_checkpointing=training.gradient_checkpointing,
        quantization=engine.quantization if lora else None,
        vocabulary=engine.vocabulary if lora else "fp32",
        accumulates=step > budget,
        optimizer=training.optimizer,
        weights=training.weights if lora is None else "fp32",
        sharding=hardware.sharding,
        gpus=hardware.gpus,
        head_chunk=hardware.head_chunk,
    )


def trained_adapter(params: Params, training: SftSettings | DpoSettings) -> LoraSettings | None:
    """Return the adapter that is trained. An adapter that is continued is planned with rank 16."""
    continued = LoraSettings(rank=16, alpha=32) if params.model.adapter == "continue" else None
    return training.lora or continued


def stage_memory(stage: str, params: Params, shape: Shape, pair: Pair, hardware: Hardware) -> Memory | None:
    """Return the peak memory of a stage, or None if it runs no model."""
    engine, evaluate = params.engine, params.evaluate
    if stage in ("sft", "train"):
        settings = params.sft if stage == "sft" else params.dpo
        if settings is None:
            return None
        setup = training_setup(params, settings, trained_adapter(params, settings), pair, hardware)
        return planner.training_memory(shape, pair, setup, hardware.overhead)
    scoring = Setup(
        max_tokens_per_microbatch=max(engine.max_tokens_per_microbatch, pair.tokens),
        precision=engine.precision,
        quantization=engine.quantization,
        vocabulary=engine.vocabulary,
        sharding=hardware.sharding,
        gpus=hardware.gpus,
        head_chunk=hardware.head_chunk,
    )
    passes, served = [], evaluate.sampler.kind != "transformers"
    if stage != "reference_samples" or served:
        # With an adapter, the reference is the policy without it, or with another one.
        models = 2 if stage == "evaluate" and not params.trains_adapter else 1
        kl = stage != "reference_logprobs"
        passes.append(planner.reference_memory(shape, scoring, hardware.overhead, models, kl))
    if stage != "reference_logprobs" and not served:
        new = evaluate.max_new_tokens if isinstance(evaluate.max_new_tokens, int) else 2 * pair.completion
        prompt = max(1, min(pair.prompt, engine.max_length - new))
        sizes = prompt, new, evaluate.max_tokens_per_batch
        passes.append(planner.sampling_memory(shape, scoring, hardware.overhead, *sizes))
    return max(passes, key=lambda memory: memory.total)


def experts_note(params: Params, shape: Shape) -> str:
    """Return that NF4 does not apply to experts, or nothing if it is off or the model has none."""
    if params.engine.quantization is None or not shape.experts:
        return ""
    share = shape.expert_parameters / shape.parameters
    return (
        f"engine.quantization: nf4 applies to linear layers, not to experts: {share:.0%} of the parameters are "
        f"planned in {params.engine.precision}"
    )


def sampler_note(params: Params, shape: Shape, gib: float) -> str:
    """Return what a GPU of `gib` GiB needs for the server that samples, or nothing if the stages sample."""
    sampler, engine = params.evaluate.sampler, params.engine
    if sampler.kind == "transformers":
        return ""
    if sampler.kind == "openai":
        return (
            f"evaluate.sampler: the memory of the server at {sampler.base_url} is not planned; if it runs on the "
            "same GPU, reduce --gpu-memory by what it uses"
        )
    setup = Setup(1, engine.precision, quantization=engine.quantization, vocabulary=engine.precision)
    one = planner.keys_and_values(shape, engine.max_length, setup.width)
    least = (planner.frozen_weights(shape, setup) + one) / 2**30
    return (
        f"evaluate.sampler: vLLM runs before reference_samples and evaluate load their model, not beside it. It "
        f"needs {least:.1f} GiB for weights and one response of {engine.max_length:,} tokens, and by default uses "
        f"most of the {gib:.0f} GiB for further responses (--gpu-memory-utilization)"
    )


def smaller_settings(stage: str, params: Params) -> dict[str, Params]:
    """Return `params` with one setting each that needs less memory, by key and value."""
    section, lora = "sft" if stage == "sft" else "dpo", LoraSettings(rank=16, alpha=32)
    tokens = min(1024, params.engine.max_tokens_per_microbatch)
    batch = min(2048, params.evaluate.max_tokens_per_batch)
    changes: list[tuple[str, str, Any]] = []
    if stage in ("sft", "train"):
        changes.append((section, "gradient_checkpointing", True))
    if stage in ("sft", "train", "evaluate") and params.model.adapter != "continue":
        changes.append((section, "lora", lora))
    changes.append(("engine", "precision", "bf16"))
    if params.trains_adapter:
        changes += [("engine", "quantization", "nf4"), ("engine", "vocabulary", "bf16")]
    changes += [("engine", "max_tokens_per_microbatch", tokens), ("evaluate", "max_tokens_per_batch", batch)]
    texts = {"True": "true", str(lora): "{rank: 16, alpha: 32}"}
    return {
        f"{group}.{key}: {texts.get(str(value), value)}": replace(
            params, **{group: replace(getattr(params, group), **{key: value})}
        )
        for group, key, value in changes
        if getattr(getattr(params, group), key) in (None, False, "fp32") or value in (tokens, batch)
    }


def advice(stage: str, params: Params, shape: Shape, pair: Pair, hardware: Hardware, available: float) -> str:
    """Return the settings with which a stage fits in `available` bytes, and its planned memory with them."""
    changes: list[str] = []
    planned = _total(stage, params, shape, pair, hardware)
    while planned > available:
        smaller = smaller_settings(stage, params)
        totals = {change: _total(stage, each, shape, pair, hardware) for change, each in smaller.items()}
        change = next((change for change, total in totals.items() if total < 0.99 * planned), None)
        if change is None:
            tried = f"with {', '.join(changes)} " if changes else ""
            return f"{tried}it needs {planned / 2**30:.1f} GiB; use a smaller model or several GPUs"
        params, planned, changes = smaller[change], totals[change], [*changes, change]
    return f"set {', '.join(changes)} ({planned / 2**30:.1f} GiB)"


def _total(stage: str, params: Params, shape: Shape, pair: Pair, hardware: Hardware) -> float:
    memory = stage_memory(stage, params, shape, pair, hardware)
    return 0 if memory is None else memory.total


def mean_pair(rows: Sequence[Any]) -> Pair:
    """Return the mean lengths of the first 1,000 token rows."""
    rows = [rows[i] for i in range(min(len(rows), 1000))]
    completions = [len(ids) for row in rows for ids in row.completions]
    prompt, completion = sum(len(row.prompt) for row in rows) / len(rows), sum(completions) / len(completions)
    return Pair(max(1, round(prompt)), max(1, round(completion)))


def check_memory(stage: str, params: Params, model: Path, pair: Pair = TYPICAL) -> None:
    """Stop a stage that cannot fit in memory, before it loads the model in the folder `model`.

    The memory is what is free on the GPU, or what the machine has. Models without a plan are not checked.

    Raises:
        InputError: the planned memory exceeds it. The message names the settings to change.
    """
    import psutil
    import torch
    from transformers import AutoConfig

    from dpo.common.distributed import shards_weights, this_process
    from dpo.engine.pretrained import load_weights

    if not params.run.check_memory:
        return
    try:
        shape = checked_shape(load_weights(AutoConfig, model))
    except InputError:
        return
    state, on_gpu = this_process(), torch.cuda.is_available()
    sharding: Sharding = "data" if state.num_processes > 1 else "none"
    if shards_weights():
        sharding = "full"
    hardware = Hardware(state.num_processes, sharding, on_gpu)
    host = psutil.virtual_memory().total / state.num_processes
    available = torch.cuda.mem_get_info(state.device)[0] if on_gpu else host
    planned = _total(stage, params, shape, pair, hardware)
    if planned > available:
        raise InputError(
            f"{stage}: not enough memory: planned {planned / 2**30:.1f} GiB, available {available / 2**30:.1f} "
            f"GiB; {advice(stage, params, shape, pair, hardware, available)}. To skip this check, set "
            "run.check_memory: false"
        )
