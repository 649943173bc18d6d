"""The quick faults, each once; `make faults` injects all faults several times."""

import random

import pytest

from tests.support.faults import FAULTS, NotSupported, make_quick

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    return make_quick(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("once", [fault.once for fault in FAULTS if fault.quick], ids=lambda once: once.__name__)
def test_the_project_recovers_from_a_fault(projects, tmp_path, once):
    try:
        once(projects, tmp_path, random.Random(17))
    except NotSupported as error:
        pytest.skip(str(error))
