"""Planned figures of four sizes."""

from dataclasses import replace

import pytest

from benchmarks.page import markers
from benchmarks.planner import LARGE
from benchmarks.scale import LLAMA_405B, PAGE, Recipe, communication, planned, recipes, table
from dpo.planner import LLAMAS, Setup


def test_parameters_equal_the_model_card():
    assert pytest.approx(405.8534, abs=1e-4) == LLAMA_405B.parameters / 1e9


def test_a_gpu_receives_the_weights_of_the_others_twice_and_reduces_gradients_once():
    shape, setup = LLAMAS["llama-8b"], Setup(8192, sharding="full", gpus=4)
    assert communication(shape, setup) == 3 * 4 * shape.parameters * 3 / 4
    assert communication(shape, replace(setup, gpus=1)) == 0
    adapters = communication(shape, replace(setup, precision="bf16", lora_rank=16))
    assert adapters < communication(shape, setup) / 2


@pytest.mark.parametrize(("name", "write"), [("scale", table), ("recipes", recipes)])
def test_the_page_has_the_table(name, write):
    start, end = markers(name)
    assert PAGE.read_text().split(start)[1].split(end)[0].strip() == write()


def test_a_recipe_is_planned_in_the_micro_batches_of_its_steps():
    recipe = Recipe("8B", LLAMAS["llama-8b"], 4, 64, None, None)
    memory, compute, sent = planned(recipe, LARGE)
    more_memory, same_compute, half = planned(replace(recipe, pairs_per_step=32), LARGE)
    assert compute == same_compute
    assert sent == pytest.approx(half), "16 pairs of 768 tokens are two passes, 8 are one"
    assert memory > more_memory, "the gradients of the first pass"
    assert planned(replace(recipe, pairs_per_step=16), LARGE)[2] == pytest.approx(2 * sent)
