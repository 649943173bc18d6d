"""Sharing of own models, data and results with DVC."""

import json
from pathlib import Path

import pytest

from tests.support.project import TRIAL, change, execute, make_project

OWN = ("models/own/tiny", "data/own/pairs.jsonl")
STAGES = ("fetch_model", "ingest")
COMMIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm")


def up_to_date(folder: Path, *targets: str) -> bool:
    return execute(folder, "dvc", "status", *targets).strip().endswith("up to date.")


def commit(folder: Path, subject: str) -> None:
    execute(folder, "git", "add", "-A")
    execute(folder, *COMMIT, subject)


@pytest.fixture
def project(tmp_path, tiny_model_dir):
    """A project with own files that git does not have, and a DVC remote."""
    folder = make_project(tmp_path / "project", tiny_model_dir)
    execute(folder, "git", "rm", "-rq", "--cached", *OWN)
    execute(folder, "dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "remote"))
    return folder


def test_dvc_add_after_the_run_leaves_stages_up_to_date_here_and_in_a_clone(project, tmp_path):
    execute(project, "dvc", "repro", *STAGES)
    execute(project, "dvc", "add", *OWN)
    assert up_to_date(project, *STAGES)
    commit(project, "share")
    execute(project, "dvc", "push")
    clone = tmp_path / "clone"
    execute(tmp_path, "git", "clone", "-q", str(project), str(clone))
    execute(clone, "dvc", "pull", *STAGES, *(f"{path}.dvc" for path in OWN))
    assert up_to_date(clone, *STAGES)
    with (clone / OWN[1]).open("a") as file:
        file.write('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert not up_to_date(clone, "ingest"), "a change of the data must be seen"


@pytest.mark.slow
def test_a_clone_has_nothing_to_do_after_a_second_sweep_and_no_metrics_of_the_first(project, tmp_path):
    execute(project, "dvc", "add", *OWN)
    execute(project, "dvc", "repro")
    commit(project, "first sweep")
    change(project, {"sweep.betas": [0.2]})
    execute(project, "dvc", "repro")
    assert up_to_date(project)
    commit(project, "second sweep")
    new = TRIAL.replace("-0.1-", "-0.2-")
    tracked = execute(project, "git", "ls-files", "metrics/evaluate", "metrics/train").split()
    assert tracked == [f"metrics/evaluate/{new}.json", f"metrics/train/{new}.csv"]
    shown = json.loads(execute(project, "dvc", "metrics", "show", "--json"))
    assert list(shown[""]["data"]) == ["metrics/summary.json"]
    assert shown[""]["data"]["metrics/summary.json"]["data"]["kl"] > 0
    execute(project, "dvc", "push")
    clone = tmp_path / "clone"
    execute(tmp_path, "git", "clone", "-q", str(project), str(clone))
    execute(clone, "dvc", "pull")
    assert up_to_date(clone)
    assert "Running stage" not in execute(clone, "dvc", "repro")
