"""Experiments of DVC in folders of their own log to the checkout's MLflow; `dpo tune` searches with them."""

import json
import sys

import mlflow
import pytest

from tests.support.project import change, execute, make_project

DPO = (sys.executable, "-m", "tasks.commands.cli")
AUTHOR = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_dir):
    """A project that has run. DVC tracks its data, git its settings and results."""
    folder = make_project(tmp_path_factory.mktemp("experiments"), tiny_model_dir)
    execute(folder, "git", "rm", "-rq", "--cached", "data/own/pairs.jsonl", "models/own/tiny")
    execute(folder, "dvc", "add", "models/own/tiny")
    change(folder, {"dpo.early_stop": {"validation_share": 0.25, "every_steps": 1, "patience": 3}})
    execute(folder, "dvc", "repro")
    execute(folder, "git", "add", "params.yaml", "dvc.lock", "metrics", "models", ".gitignore")
    execute(folder, *AUTHOR, "commit", "-qm", "run")
    return folder


@pytest.mark.slow
def test_a_search_continues_and_its_best_policy_can_be_applied(project):
    change(project, {"validate.max_quarantined": 0.11})  # ingest and validate run, so untracked data is missing
    output = execute(project, *DPO, "tune", "--trials", "1", fails=True)
    assert "data/own/pairs.jsonl: neither git nor DVC tracks it" in output
    assert "`dvc add data/own/pairs.jsonl`" in output
    execute(project, "git", "checkout", "params.yaml")
    execute(project, "dvc", "add", "data/own/pairs.jsonl")
    execute(project, "git", "add", "-A")
    execute(project, *AUTHOR, "commit", "-qm", "track the data")
    before = (project / "params.yaml").read_text()
    search = (*DPO, "tune", "--name", "second", "--betas", "0.05", "1")
    execute(project, *search, "--trials", "1")
    output = execute(project, *search, "--trials", "2")
    assert "second-1: sigmoid, beta " in output
    assert "second-0: sigmoid" not in output
    assert (project / "params.yaml").read_text() == before
    assert "up to date" in execute(project, "dvc", "status")
    assert list((project / ".dvc/tmp/exps/standalone").glob("tmp*")) == []
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    runs = mlflow.search_runs(experiment_names=["dpo-pipeline"], output_format="list")
    policies = [run for run in runs if run.data.tags["dpo.role"] == "policy"]
    assert len(policies) == 3
    for run in runs:
        assert run.info.artifact_uri.startswith(f"{project}/mlruns/")
    assert all("train/eval_rewards/accuracies" in run.data.metrics for run in policies)
    assert "second-0 is the best" in output or "second-1 is the best" in output
    execute(project, "dvc", "exp", "apply", "second-1")
    assert "up to date" in execute(project, "dvc", "status")
    (name,) = json.loads((project / "metrics/comparison.json").read_text())["policies"]
    assert (project / "models" / name).is_dir()
