"""Peak memory per GPU of a training with sharded weights, simulated on a CPU without weights.

    python -m benchmarks.simulate --model llama-70b --ranks 64    # adds to benchmarks/results/simulate.json
    python -m benchmarks.simulate --table    # writes the table of docs/internals/scaling.md

The simulation runs the engine's packed stream, head, objective and FSDP2 units, and AdamW, for two steps.
Tensors have shapes but no data (`FakeTensorMode`), and a fake process group stands for the other ranks. It
counts tensors, not fragments of the allocator, buffers of NCCL or the CUDA context.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPModMemStats
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.page import put_table
from dpo.common.files import write_json
from dpo.engine import head
from dpo.engine.attention import PACKED_ATTENTION, VarlenMetadata, varlen_metadata
from dpo.engine.flops import Shape
from dpo.engine.logprobs import LogProbModel
from dpo.engine.packing import Layout, PackedBatch, pack
from dpo.engine.settings import GPU_HEAD_CHUNK
from dpo.engine.sharding import apply_fsdp
from dpo.engine.tokenization import TokenRow
from dpo.planner import LLAMAS, Pair, Setup, training_memory
from dpo.training.losses import Sigmoid
from dpo.training.objectives import DpoObjective
from dpo.training.settings import LoraSettings
from dpo.training.train import add_lora

RESULTS, PAGE = Path("benchmarks/results/simulate.json"), Path("docs/internals/scaling.md")
CONFIG = Path("configs/one-node-fsdp.yaml")
PAIR = Pair(prompt=256, completion=256)
GIB = 2**30


class SimulatedBatch(PackedBatch):
    """A batch whose lengths come from its layout, because its tensors have no data."""

    @property
    def lengths(self) -> Tensor:
        """The number of scored tokens of each completion."""
        return torch.tensor([length for _, lengths in self.layout for length in lengths])


class PeakTracker(FSDPMemTracker):
    """Tracks the peak of a step, without a peak of each module, whose time grows with the square of the layers."""

    def _update_peak_stats(self, _: object) -> None:
        for device, memory in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < memory["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = memory["Total"], dict(memory)


class SimulatedModel(LogProbModel):
    """The engine with the attention of a GPU, whose shapes are known without one."""

    def _layout(self, layout: Layout) -> Layout | VarlenMetadata:
        return varlen_metadata(layout, self.device) if self.precision == "bf16" else layout


def simulate(shape: Shape, setup: Setup, pair: Pair = PAIR, config: Path = CONFIG) -> dict[str, float]:
    """Return the peak bytes of one rank in the second step of a training, in all (`Total`) and by category.

    `config` is the accelerate configuration that shards the model over `setup.gpus` ranks.
    """
    batch = packed(pair, setup.max_tokens_per_microbatch)
    with ranks(setup.gpus) as mesh, FakeTensorMode(allow_non_fake_inputs=True), chunks(setup.head_chunk):
        model = sharded_model(shape, setup, config, mesh)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=False)
        tracker = PeakTracker(model.model.get_decoder(), optimizer)
        tracker.track_inputs(())
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                # The tracker looks this module up, but its forward is never called: the engine uses its weight.
                vocabulary = model.get_output_embeddings()
                tracker.memory_tracking[vocabulary] = _FSDPModMemStats("lm_head")
                step(model, optimizer, batch, setup)
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(name, "value", name)): float(value) for name, value in peak.items()}


@contextmanager
def ranks(count: int) -> Iterator[DeviceMesh]:
    """Pretend to be rank 0 of `count` processes inside the block. Yield their mesh."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,), mesh_dim_names=("fsdp",))
    finally:
        dist.destroy_process_group()


@contextmanager
def chunks(size: int) -> Iterator[None]:
    """Project `size` positions to the vocabulary at a time inside the block, as a GPU does."""
    before, head.HEAD_CHUNK = head.HEAD_CHUNK, size
    try:
        yield
    finally:
        head.HEAD_CHUNK = before


def sharded_model(shape: Shape, setup: Setup, config: Path, mesh: DeviceMesh) -> LogProbModel:
    """Return a Llama of this shape, prepared and sharded as for training."""
    llama = LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with unset_fake_temporarily(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama, dtype=torch.float32)
        engine = SimulatedModel(model, setup.precision, in_stream=True, vocabulary=setup.vocabulary)
        if setup.lora_rank is not None:
            add_lora(model, LoraSettings(rank=setup.lora_rank, alpha=2 * setup.lora_rank))
        engine.hold_frozen_weights()
        model.set_attn_implementation(PACKED_ATTENTION)
    fake_weights(model)
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    engine.train()
    plugin = fsdp_plugin(config)
    apply_fsdp(model, mesh, plugin.reshard_after_forward, plugin.cpu_offload)
    return engine


def fake_weights(model: nn.Module) -> None:
    """Replace weights and buffers on the meta device by fake ones on the CPU. Tied weights stay tied."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                tensors[name] = None if tensor is None else made[tensor]


def fsdp_plugin(config: Path) -> FullyShardedDataParallelPlugin:
    """Return the FSDP2 settings of an accelerate configuration."""
    settings = yaml.safe_load(config.read_text())["fsdp_config"]
    names = {"fsdp_offload_params": "cpu_offload", "fsdp_version": "fsdp_version"}
    return FullyShardedDataParallelPlugin(
        **{names.get(name, name.removeprefix("fsdp_")): value for name, value in settings.items()}
    )


def step(model: LogProbModel, optimizer: torch.optim.Optimizer, batch: PackedBatch, setup: Setup) -> None:
    """Run one step of training; two micro-batches if the step accumulates gradients."""
    objective = DpoObjective(Sigmoid(), 0.1, lambda batch: torch.zeros(2 * len(batch.ids)))
    for _ in range(2 if setup.accumulates else 1):
        loss, metrics = objective(model, batch)
        loss.backward()
        del loss, metrics
    optimizer.step()
    optimizer.zero_grad()


def packed(pair: Pair, tokens: int) -> PackedBatch:
    """Return a micro-batch of pairs of these lengths with at most `tokens` tokens."""
    prompt, completion = (1,) * pair.prompt, (1,) * pair.completion
    rows = [TokenRow(str(i), prompt, (completion, completion)) for i in range(tokens // pair.tokens)]
    return SimulatedBatch(**vars(pack(rows)))


def table(cases: list[dict[str, Any]]) -> str:
    """Return the table of simulated and planned memory."""
    lines = [
        "| model | GPUs | training | checkpointing | tokens | simulated, GiB | planned, GiB (ratio) | CPU s |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        setup = Setup(**case["setup"])
        planned = training_memory(LLAMAS[case["model"]], PAIR, setup, overhead=0).total
        simulated = case["bytes"]["Total"]
        training = "all weights" if setup.lora_rank is None else f"LoRA, rank {setup.lora_rank}"
        lines.append(
            f"| {case['model']} | {setup.gpus} | {training} | {'on' if setup.gradient_checkpointing else 'off'} | "
            f"{setup.max_tokens_per_microbatch:,} | {simulated / GIB:.1f} | "
            f"{planned / GIB:.1f} ({planned / simulated:.2f}) | {case['seconds']:.0f} |"
        )
    return "\n".join(lines)


def add(case: dict[str, Any]) -> None:
    """Write a case to the results. It replaces the case of the same model and setup."""
    cases = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else []
    replaced = case["model"], Setup(**case["setup"])
    cases = [each for each in cases if (each["model"], Setup(**each["setup"])) != replaced]
    cases = sorted([*cases, case], key=lambda case: (case["model"], str(case["setup"]["lora_rank"])))
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    write_json(RESULTS, {"cases": cases, "versions": versions})


def main() -> None:
    """Simulate a model and write the table, or only write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LLAMAS, default="llama-8b")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--lora-rank", type=int, help="rank of the adapters (default: train all weights)")
    parser.add_argument("--tokens", type=int, default=7680, help="tokens in a micro-batch of one GPU")
    parser.add_argument("--config", type=Path, default=CONFIG, help="accelerate configuration with FSDP2")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        setup = Setup(
            max_tokens_per_microbatch=arguments.tokens, precision="bf16", lora_rank=arguments.lora_rank,
            gradient_checkpointing=True, sharding="full", gpus=arguments.ranks, head_chunk=GPU_HEAD_CHUNK,
        )  # fmt: skip
        start = time.process_time()
        simulated = simulate(LLAMAS[arguments.model], setup, config=arguments.config)
        seconds = time.process_time() - start
        add({"model": arguments.model, "setup": asdict(setup), "bytes": simulated, "seconds": seconds})
    put_table(PAGE, "simulate", table(json.loads(RESULTS.read_text())["cases"]))


if __name__ == "__main__":
    main()
