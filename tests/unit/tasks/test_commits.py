"""Reading commits and changes from git."""

import subprocess
from pathlib import Path

import pytest

from dpo.common.errors import InputError
from tasks.common.git import committed_file, head_commit, inputs_changed, uncommitted


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
    assert (head_commit(), inputs_changed()) == ("none", False)
    assert committed_file(Path("params.yaml")) is None
    with pytest.raises(InputError, match="no commit"):
        uncommitted()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [(None, False), ("dvc.lock", False), ("metrics/a.json", False), ("new.txt", False), ("params.yaml", True)],
)
def test_results_and_new_files_are_not_changed_inputs(repository, changed, expected):
    if changed:
        (repository / changed).write_text("after")
    assert len(head_commit()) == 40
    assert inputs_changed() is expected


def test_uncommitted_lists_tracked_files_and_new_files_among_given_paths(repository):
    paths = ["params.yaml", "dvc.yaml", "metrics"]
    assert uncommitted(*paths) == []
    for name in ("params.yaml", "dvc.yaml", "notes.txt"):
        (repository / name).write_text("after")
    assert uncommitted(*paths) == ["params.yaml", "dvc.yaml"]
    assert uncommitted() == ["params.yaml"]


def test_committed_file_returns_the_content_of_the_last_commit(repository):
    (repository / "params.yaml").write_text("after")
    assert committed_file(Path("params.yaml")) == b"before"
    assert committed_file(Path("absent")) is None
