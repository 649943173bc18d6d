"""Token rows of the tiny model and their reference log-probs."""

import pytest

from tests.support.training import make_reference, make_rows


@pytest.fixture(scope="module")
def rows(tiny_model_dir):
    return make_rows(tiny_model_dir, 18)


@pytest.fixture(scope="module")
def reference(tiny_model_dir, rows):
    return make_reference(tiny_model_dir, rows)
