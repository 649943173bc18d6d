"""Fixtures of the tests of servers."""

from types import SimpleNamespace

import pytest

from dpo.evaluation import endpoint


@pytest.fixture
def waits(monkeypatch):
    """Replace `time.sleep` of requests and return the list of requested seconds."""
    waits = []
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=waits.append))
    return waits
