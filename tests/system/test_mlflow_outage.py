"""An outage of the MLflow server: training continues, and the server later has every record once."""

import logging
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import plotly.graph_objects as go
import pytest
import requests
from mlflow.utils import rest_utils

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.training.losses import Sigmoid
from dpo.training.settings import Trial
from tasks.common.paths import COMPARISON, REPORT, policy_folder
from tasks.tracking import offline, run_logger
from tasks.tracking import runs as tracking
from tasks.tracking.provenance import weights
from tasks.tracking.steplog import StepLog
from tests.support.mlflow_server import Server

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
TABLE = pd.DataFrame({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]})
BEFORE, DURING, OFFLINE, CONCURRENT = (
    Trial(loss=Sigmoid(), beta=0.1, learning_rate=1e-5, seed=seed) for seed in range(4)
)


def train(trial, halfway=lambda: None):
    """Log a training of 25 steps as the stage `train` does."""
    with tracking.policy_run(PARAMS, trial) as run_id:
        log = StepLog(run_id)
        for number in range(1, 26):
            log.on_log({"step": number, "loss": 1 / number})
            if number == 15:
                halfway()
        log.on_end()
        logging.getLogger("dpo").warning("%s runs away", trial.name)
        tracking.tag_checkpoint(run_id, policy_folder(trial))
    return run_id


def evaluate(trial):
    tracking.log_evaluation(PARAMS, trial, {"kl": 1.5, "kl_ci": [1.0, 2.0]}, TABLE)


def lose_responses(number):
    """Return MLflow's request function, which executes all requests but loses responses from this number on."""
    send = rest_utils._get_http_response_with_retries
    left = iter(range(number - 1))

    def request(*args, **kwargs):
        response = send(*args, **kwargs)
        if next(left, None) is None:
            raise requests.ConnectionError("lost")
        return response

    return request


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Log one trial with the server, one partly with it, one offline, the other stages offline; then sync."""
    folder = tmp_path_factory.mktemp("outage")
    server, story = Server(folder), SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", server.url)
        for path in (
            "data/train.parquet",
            "data/eval.parquet",
            "data/raw_pairs.parquet",
            REPORT,
            COMPARISON,
        ):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            TABLE.to_parquet(path)
        for trial in (BEFORE, DURING, OFFLINE, CONCURRENT):
            policy_folder(trial).mkdir(parents=True)
            (policy_folder(trial) / "model.safetensors").write_text(trial.name)
        server.start()
        try:
            story.before = train(BEFORE)
            story.during = train(DURING, halfway=server.kill)
            patch.setenv(
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"
            )  # the retries are tested above; skip them from here on
            with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI: .* connection refused"):
                offline.connect()
            story.offline = train(OFFLINE)
            patch.setattr(offline, "head_commit", lambda: "later")
            for trial in (BEFORE, DURING, OFFLINE):
                evaluate(trial)
            tracking.log_validation(PARAMS, {"rows": 7}, [Path("data/train.parquet")])
            figure = go.Figure(layout={"title": {"text": "Frontier"}})
            tracking.log_comparison(PARAMS, {"policy": {"kl": 1.5}}, OFFLINE.name, "why", [figure])

            server.start()
            story.interruptions = 0
            for number in range(3, 500, 4):
                with pytest.MonkeyPatch.context() as outage:
                    outage.setattr(rest_utils, "_get_http_response_with_retries", lose_responses(number))
                    if offline.connect_or_offline():
                        break
                    story.interruptions += 1
            offline.connect()
            yield story
        finally:
            server.kill()


@pytest.fixture
def runs(story):
    assert offline.connect_or_offline()
    return {run.info.run_name: run for run in every_run()}


def every_run():
    return mlflow.search_runs(experiment_names=[offline.EXPERIMENT], output_format="list")


def history(run, name):
    return [(p.step, p.value) for p in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)]


def files(run):
    client = mlflow.MlflowClient()
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def test_every_run_is_on_the_server_once_after_an_often_interrupted_sync(story, runs):
    assert story.interruptions > 5
    names = Counter(run.info.run_name for run in every_run())
    trials = {trial.name: 1 for trial in (BEFORE, DURING, OFFLINE)}
    (sweep,) = (name for name in names if name.startswith("sweep"))
    assert names == trials | {"data": 1, sweep: 1}
    assert {run.info.status for run in every_run()} == {"FINISHED"}


@pytest.mark.parametrize("trial", [BEFORE, DURING, OFFLINE], ids=["before", "during", "offline"])
def test_the_run_of_a_policy_is_complete_wherever_it_was_logged(runs, trial):
    run = runs[trial.name]
    assert sorted(history(run, "train/loss")) == [(n, 1 / n) for n in range(1, 26)]
    assert run.data.metrics["train/loss"] == 1 / 25
    assert {k: history(run, f"eval/{k}") for k in ("kl", "kl_low", "kl_high")} == {
        "kl": [(0, 1.5)], "kl_low": [(0, 1.0)], "kl_high": [(0, 2.0)]
    }  # fmt: skip
    assert run.data.params["seed"] == str(trial.seed)
    assert run.data.params["engine.precision"] == PARAMS.engine.precision
    assert run.data.tags[run_logger.WARNINGS] == f"{trial.name} runs away\n"
    assert run.data.tags[offline.CHECKPOINT] == weights(policy_folder(trial))
    assert run.data.tags["git_commit"] == "none"
    sweep = next(run for name, run in runs.items() if name.startswith("sweep"))
    assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"train", "eval"}
    assert files(run) == {"samples.json"}


def test_the_run_ids_in_provenance_files_are_found(story, runs):
    assert runs[BEFORE.name].info.run_id == story.before
    assert runs[DURING.name].info.run_id == story.during
    assert runs[OFFLINE.name].data.tags[offline.OFFLINE_RUN] == story.offline


def test_times_are_those_of_the_training_and_not_of_the_sync(story, runs):
    local = mlflow.MlflowClient(offline.OFFLINE_STORE).get_run(story.offline)
    for name in ("start_time", "end_time", "status"):
        assert getattr(runs[OFFLINE.name].info, name) == getattr(local.info, name)


def test_the_comparison_is_in_the_sweep_run_that_the_server_already_had(runs):
    sweep = next(run for name, run in runs.items() if name.startswith("sweep"))
    assert history(sweep, "policy/kl") == [(0, 1.5)]
    assert sweep.data.tags["dpo.selected"] == OFFLINE.name
    assert sweep.data.tags["mlflow.note.content"] == "why"
    assert sweep.data.params["seed"] == str(PARAMS.seed)
    assert files(sweep) == {REPORT.name, COMPARISON.name, "figures"}
    assert history(runs["data"], "data/rows") == [(0, 7.0)]
    assert files(runs["data"]) == {"train.parquet"}


def test_a_running_offline_training_is_synced_twice_into_one_run(story, runs):
    seen = []

    def go_offline():
        offline._use_offline_store(os.environ["MLFLOW_TRACKING_URI"], OSError("it was down"))

    def sync_in_another_stage():  # which starts when the server is up again
        assert offline.connect_or_offline()
        seen.extend(run for run in every_run() if run.info.run_name == CONCURRENT.name)
        go_offline()

    with pytest.MonkeyPatch.context() as outage:
        outage.setattr(offline, "connect_or_offline", go_offline)
        run_id = train(CONCURRENT, halfway=lambda: (outage.undo(), sync_in_another_stage()))
    (partial,) = seen
    assert partial.info.status == "RUNNING"
    assert partial.data.metrics["train/loss"] == 1 / 10
    assert offline.connect_or_offline()
    (complete,) = (run for run in every_run() if run.info.run_name == CONCURRENT.name)
    assert complete.info.run_id == partial.info.run_id
    assert complete.data.tags[offline.OFFLINE_RUN] == run_id
    assert complete.info.status == "FINISHED"
    assert sorted(history(complete, "train/loss")) == [(n, 1 / n) for n in range(1, 26)]


def test_a_client_error_of_the_server_is_one_clear_error(story, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", os.environ["MLFLOW_TRACKING_URI"] + "/elsewhere")
    with pytest.raises(InputError, match=r"MLflow at \S+ refuses: .*404.*`mlflow experiments search`"):
        offline.connect_or_offline()
