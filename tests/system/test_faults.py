"""The quick faults, each once; `make faults` injects all faults several times."""

import random

import pytest

from tests.support import nightly
from tests.support.faults.catalogue import FAULTS
from tests.support.faults.projects import NotSupported, make_quick

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


def test_killed_nightly_runs_recover_and_finished_cases_are_not_repeated(tmp_path, monkeypatch):
    first = nightly.run(5, cases=4, folder=tmp_path)
    assert [(row["tried"], row["survived"]) for row in first] == [(3, 3), (1, 1)], list(tmp_path.iterdir())
    files = {path: path.read_bytes() for path in tmp_path.glob("case-*.json")}
    assert len(files) == 4
    assert all('"seed": 5' in content.decode() for content in files.values())
    monkeypatch.setattr(nightly, "nights", None)  # a case that runs would fail
    assert nightly.run(5, cases=4, folder=tmp_path) == first
