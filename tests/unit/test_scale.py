"""Planned figures of four sizes."""

from dataclasses import replace

import pytest

from benchmarks.page import markers
from benchmarks.scale import LLAMA_405B, PAGE, communication, table
from dpo.planner import LLAMAS, Setup


def test_parameters_equal_the_model_card():
    assert pytest.approx(405.8534, abs=1e-4) == LLAMA_405B.parameters / 1e9


def test_a_gpu_receives_the_weights_of_the_others_twice_and_reduces_gradients_once():
    shape, setup = LLAMAS["llama-8b"], Setup(8192, sharding="full", gpus=4)
    assert communication(shape, setup) == 3 * 4 * shape.parameters * 3 / 4
    assert communication(shape, replace(setup, gpus=1)) == 0
    adapters = communication(shape, replace(setup, precision="bf16", lora_rank=16))
    assert adapters < communication(shape, setup) / 2


def test_the_page_has_the_table():
    start, end = markers("scale")
    assert PAGE.read_text().split(start)[1].split(end)[0].strip() == table()
