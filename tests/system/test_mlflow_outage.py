"""MLflow's server, killed with SIGKILL: trainings go on, and all reaches it later, once."""

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
from dpo.training.settings import Trial
from tasks.commands import sync
from tasks.common.paths import COMPARISON, REPORT, policy_folder
from tasks.tracking import offline
from tasks.tracking import runs as tracking
from tasks.tracking.steplog import StepLog
from tests.support.mlflow_server import Server

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
TABLE = pd.DataFrame({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]})
BEFORE, MIDDLE, WITHOUT, BESIDE = (
    Trial(loss="sigmoid", beta=0.1, learning_rate=1e-5, seed=seed) for seed in range(4)
)


def train(trial, halfway=lambda: None):
    """As the stage `train` tells of a training of 25 steps."""
    with tracking.policy_run(PARAMS, trial, TABLE) as run_id:
        log = StepLog(run_id)
        for number in range(1, 26):
            log.on_log(None, SimpleNamespace(global_step=number), None, {"loss": 1 / number})
            if number == 15:
                halfway()
        log.on_train_end(None, None, None)
        logging.getLogger("dpo").warning("%s runs away", trial.name)
        tracking.tag_checkpoint(run_id, policy_folder(trial))
    return run_id


def evaluate(trial):
    tracking.log_evaluation(PARAMS, trial, TABLE, {"kl": 1.5, "kl_ci": [1.0, 2.0]}, TABLE)


def after(number):
    """MLflow's requests, whose answers are lost from this number on, though the server has done what they ask."""
    asked = rest_utils._get_http_response_with_retries
    left = iter(range(number - 1))

    def ask(*args, **kwargs):
        answer = asked(*args, **kwargs)
        if next(left, None) is None:
            raise requests.ConnectionError("lost")
        return answer

    return ask


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One trial trained with the server, one half with it, one without; the rest of the pipeline without it."""
    folder = tmp_path_factory.mktemp("outage")
    server, told = Server(folder), SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", server.url)
        for path in (
            "data/train.parquet",
            "data/eval.parquet",
            "data/raw_pairs.parquet",
            "reference/train/manifest.json",
            REPORT,
            COMPARISON,
        ):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            TABLE.to_parquet(path)
        for trial in (BEFORE, MIDDLE, WITHOUT, BESIDE):
            policy_folder(trial).mkdir(parents=True)
            (policy_folder(trial) / "model.safetensors").write_text(trial.name)
        server.start()
        try:
            told.before = train(BEFORE)
            told.middle = train(MIDDLE, halfway=server.kill)
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # it was waited for, once; now the test goes on
            with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI: .* connection refused"):
                sync.main()
            told.without = train(WITHOUT)
            patch.setattr(offline, "git_tags", lambda: {"git_commit": "later"})
            for trial in (BEFORE, MIDDLE, WITHOUT):
                evaluate(trial)
            tracking.log_validation(PARAMS, {"rows": 7}, [Path("data/train.parquet")])
            figure = go.Figure(layout={"title": {"text": "Frontier"}})
            tracking.log_comparison(PARAMS, {"policy": {"kl": 1.5}}, WITHOUT.name, "why", [figure])

            server.start()
            told.cuts = 0
            for number in range(3, 500, 4):
                with pytest.MonkeyPatch.context() as cut:
                    cut.setattr(rest_utils, "_get_http_response_with_retries", after(number))
                    if offline.connect_or_offline():
                        break
                    told.cuts += 1
            sync.main()
            yield told
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


def test_each_run_is_there_once_though_the_delivery_was_cut_off_again_and_again(story, runs):
    assert story.cuts > 5
    names = Counter(run.info.run_name for run in every_run())
    trials = {trial.name: 1 for trial in (BEFORE, MIDDLE, WITHOUT)}
    (sweep,) = (name for name in names if name.startswith("sweep"))
    assert names == trials | {"data": 1, sweep: 1}
    assert {run.info.status for run in every_run()} == {"FINISHED"}


@pytest.mark.parametrize("trial", [BEFORE, MIDDLE, WITHOUT], ids=["before", "middle", "without"])
def test_a_policys_run_is_whole_wherever_it_was_written(runs, trial):
    run = runs[trial.name]
    assert sorted(history(run, "train/loss")) == [(n, 1 / n) for n in range(1, 26)]
    assert run.data.metrics["train/loss"] == 1 / 25
    assert {k: history(run, f"eval/{k}") for k in ("kl", "kl_low", "kl_high")} == {
        "kl": [(0, 1.5)], "kl_low": [(0, 1.0)], "kl_high": [(0, 2.0)]
    }  # fmt: skip
    assert run.data.params["seed"] == str(trial.seed)
    assert run.data.params["engine.precision"] == PARAMS.engine.precision
    assert run.data.tags[tracking.ALARMS] == f"{trial.name} runs away\n"
    assert run.data.tags[offline.CHECKPOINT] == runs.weights(policy_folder(trial))
    assert run.data.tags["git_commit"] == "none"
    sweep = next(run for name, run in runs.items() if name.startswith("sweep"))
    assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"train", "eval"}
    assert files(run) == {"samples.json"}


def test_the_ids_that_provenance_names_are_found(story, runs):
    assert runs[BEFORE.name].info.run_id == story.before
    assert runs[MIDDLE.name].info.run_id == story.middle
    assert runs[WITHOUT.name].data.tags[offline.SPOOLED] == story.without


def test_times_are_those_of_the_training_and_not_of_the_delivery(story, runs):
    spooled = mlflow.MlflowClient(offline.SPOOL).get_run(story.without)
    for name in ("start_time", "end_time", "status"):
        assert getattr(runs[WITHOUT.name].info, name) == getattr(spooled.info, name)


def test_the_comparison_is_in_the_sweep_that_the_server_knew(runs):
    sweep = next(run for name, run in runs.items() if name.startswith("sweep"))
    assert history(sweep, "policy/kl") == [(0, 1.5)]
    assert sweep.data.tags["dpo.selected"] == WITHOUT.name
    assert sweep.data.tags["mlflow.note.content"] == "why"
    assert sweep.data.params["seed"] == str(PARAMS.seed)
    assert files(sweep) == {REPORT.name, COMPARISON.name, "figures"}
    assert history(runs["data"], "data/rows") == [(0, 7.0)]
    assert files(runs["data"]) == {"train.parquet"}


def test_a_training_that_goes_on_in_the_spool_is_delivered_as_far_as_it_is_and_then_whole(story, runs):
    seen = []

    def go_without():
        offline._use_spool(os.environ["MLFLOW_TRACKING_URI"], OSError("it was down"))

    def deliver_beside():  # as another stage does, which started when the server was back
        assert offline.connect_or_offline()
        seen.extend(run for run in every_run() if run.info.run_name == BESIDE.name)
        go_without()

    with pytest.MonkeyPatch.context() as outage:
        outage.setattr(tracking, "connect_or_offline", go_without)
        run_id = train(BESIDE, halfway=lambda: (outage.undo(), deliver_beside()))
    (partial,) = seen
    assert partial.info.status == "RUNNING"
    assert partial.data.metrics["train/loss"] == 1 / 10
    assert offline.connect_or_offline()
    (whole,) = (run for run in every_run() if run.info.run_name == BESIDE.name)
    assert whole.info.run_id == partial.info.run_id
    assert whole.data.tags[offline.SPOOLED] == run_id
    assert whole.info.status == "FINISHED"
    assert sorted(history(whole, "train/loss")) == [(n, 1 / n) for n in range(1, 26)]


def test_a_server_that_refuses_is_an_error_and_no_outage(story, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", os.environ["MLFLOW_TRACKING_URI"] + "/elsewhere")
    with pytest.raises(mlflow.MlflowException, match="404"):
        offline.connect_or_offline()
