"""Fixtures of the tests of servers and judges."""

from types import SimpleNamespace

import pytest

from dpo.evaluation import endpoint
from tests.support.judges import ChatServer


@pytest.fixture
def waits(monkeypatch):
    """Replace `time.sleep` of requests and return the list of requested seconds."""
    waits = []
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ChatServer().running() as server:
        yield server
