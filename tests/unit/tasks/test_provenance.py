"""Which commit made a result, and whether anything but results differs from it."""

import subprocess

import pytest

from tasks.tracking.provenance import commit


def git(*words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    for name in ("params.yaml", "dvc.lock", "metrics/a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    git("add", "-A")
    git("commit", "-qm", "start")
    return tmp_path


def test_outside_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commit() == ("none", False)


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [(None, False), ("dvc.lock", False), ("metrics/a.json", False), ("new.txt", False), ("params.yaml", True)],
)
def test_only_what_the_pipeline_does_not_write_itself_counts_as_a_change(repository, changed, dirty):
    if changed:
        (repository / changed).write_text("after")
    revision, found = commit()
    assert len(revision) == 40
    assert found is dirty
