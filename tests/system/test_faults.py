"""Faults that need no more than a training, each once; `make faults` does all of them, often."""

import random

import pytest

from tests.support.faults import FAULTS, Untried, make_quick


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    return make_quick(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("once", [fault.once for fault in FAULTS if fault.quick], ids=lambda once: once.__name__)
def test_a_fault_is_survived(projects, tmp_path, once):
    try:
        once(projects, tmp_path, random.Random(17))
    except Untried as untried:
        pytest.skip(str(untried))
