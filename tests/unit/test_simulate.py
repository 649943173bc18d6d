"""The planner compared with a simulated training with sharded weights, and the configurations of FSDP."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

import benchmarks.simulate
from benchmarks.simulate import PAIR, simulate
from dpo.engine.flops import Shape
from dpo.planner import LLAMAS, Setup, training_memory

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*-fsdp.yaml"))
SETUP = Setup(max_tokens_per_microbatch=7680, precision="bf16", sharding="full", gpus=8, head_chunk=1024)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("rank", [None, 16], ids=["all-weights", "lora"])
def test_planned_memory_is_within_a_tenth_of_the_simulation(rank, checkpointing):
    shape = replace(LLAMAS["llama-8b"], layers=4)
    setup = replace(SETUP, gradient_checkpointing=checkpointing, lora_rank=rank)
    planned = training_memory(shape, PAIR, setup, overhead=0).total
    assert planned == pytest.approx(simulate(shape, setup)["Total"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_shards_weights_gradients_and_states_over_all_its_processes(config):
    shape = Shape(2, 256, 512, 4, 2, 64, 1024, tied=False)
    gpus = yaml.safe_load(config.read_text())["num_processes"]
    setup = replace(SETUP, max_tokens_per_microbatch=PAIR.tokens, gpus=gpus)
    simulated = simulate(shape, setup, config=config)
    shard = 4 * shape.parameters / gpus
    assert simulated["Sharded Param"] == pytest.approx(shard, rel=0.05)
    assert simulated["Sharded Grad"] == pytest.approx(shard, rel=0.05)
    assert simulated["OptState"] == pytest.approx(2 * shard, rel=0.05)


@pytest.mark.slow
def test_the_peak_equals_that_of_the_tracker_of_torch(monkeypatch):
    shape, sizes = Shape(3, 256, 512, 4, 2, 64, 1024, tied=False), {"max_tokens_per_microbatch": PAIR.tokens}
    peak = simulate(shape, replace(SETUP, **sizes, gradient_checkpointing=True))
    monkeypatch.setattr(benchmarks.simulate, "PeakTracker", FSDPMemTracker)
    assert peak == simulate(shape, replace(SETUP, **sizes, gradient_checkpointing=True))


def test_there_are_configurations_for_one_two_and_eight_machines():
    assert {yaml.safe_load(config.read_text())["num_machines"] for config in CONFIGS} == {1, 2, 8}
