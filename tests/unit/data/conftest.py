"""Folders for the data of a test."""

import pytest


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/own").mkdir(parents=True)
    return tmp_path / "data/own"
