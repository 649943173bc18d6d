"""The view of MLflow's UI that plots reward against KL, with a real server and a real browser."""

import json
import re
import shutil
from types import SimpleNamespace

import httpx
import mlflow
import pytest

from tasks.report.comparison import selection_page
from tasks.tracking import offline
from tasks.tracking import runs as tracking
from tests.support.mlflow_server import Server
from tests.unit.tasks.test_tracking import PARAMS, make_project, trial
from tools.browser import screenshot
from tools.screens import mlflow_pages


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("mlflow"))
    found.start()
    yield found
    found.kill()


@pytest.fixture
def sweep(server, tmp_path, monkeypatch):
    """Log the policies 1 to 3 of a sweep, and a run that does not belong to it."""
    monkeypatch.chdir(make_project(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    for seed in (1, 2, 3):
        with tracking.policy_run(PARAMS, trial(seed)) as run_id:
            for name, value in {"kl": 1.5 * seed, "reward": seed / 10}.items():
                mlflow.MlflowClient().log_metric(run_id, f"eval/{name}", value)
    other = offline.new_run("not-of-this-sweep", {offline.SWEEP: "other", offline.ROLE: "policy"})
    mlflow.MlflowClient().log_metric(other, "eval/reward", 9.0)
    yield [trial(seed).name for seed in (1, 2, 3)]
    mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_the_link_opens_the_chart_of_the_sweeps_policies(server, sweep, tmp_path):
    url = tracking.frontier_page(PARAMS, "reward")
    assert httpx.get(url, trust_env=False).status_code == 200
    key = re.search(r"viewStateShareKey=(\w+)", url)[1]
    view = json.loads(mlflow.get_experiment_by_name(offline.EXPERIMENT).tags[f"mlflow.sharedViewState.{key}"])
    (chart,) = view["compareRunCharts"]
    assert (chart["xaxis"]["key"], chart["yaxis"]["key"]) == ("eval/kl", "eval/reward")
    found = mlflow.search_runs(
        experiment_names=[offline.EXPERIMENT], filter_string=view["searchFilter"], output_format="list"
    )
    assert sorted(run.info.run_name for run in found) == sweep
    assert mlflow_pages(server.url) == {"mlflow-frontier": url.replace(key, "other")}, (
        "the latest run is of another sweep"
    )
    if shutil.which("chromium") is None:
        pytest.skip("the page itself needs Chromium")
    text = screenshot(url, tmp_path / "page.png", 1500, 1000)
    for shown in ("Reward against KL (1)", "eval/kl vs. eval/reward", *sweep):
        assert shown in text, text
    assert "not-of-this-sweep" not in text


def test_without_a_server_there_is_no_link(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(offline, "CALL_SECONDS", 1)
    assert tracking.frontier_page(PARAMS, "reward") is None
    selection = SimpleNamespace(name=None, reason="None.", against_reference="tie")
    page = selection_page(SimpleNamespace(selection=selection, policies={}), "win_rate", None)
    assert "MLflow" not in page
    assert selection_page(SimpleNamespace(selection=selection, policies={}), "win_rate", "http://m/#/1").endswith(
        "[Reward against KL in MLflow](http://m/#/1)\n"
    )
    mlflow.set_tracking_uri(None)
