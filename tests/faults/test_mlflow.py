"""MLflow's server, killed with SIGKILL: trainings go on, and all reaches it later, once."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import mlflow
import pandas as pd
import plotly.graph_objects as go
import pytest
import requests
from conftest import free_ports
from mlflow.utils import rest_utils

from dpo.config import Cell, load_params
from dpo.errors import InputError
from tasks import deliver, spool, tracking
from tasks.stage import COMPARISON, REPORT, policy_folder
from tasks.steplog import StepLog

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
TABLE = pd.DataFrame({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]})
BEFORE, MIDDLE, WITHOUT, BESIDE = (
    Cell(loss="sigmoid", beta=0.1, learning_rate=1e-5, seed=seed) for seed in range(4)
)


class Server:
    """`mlflow server` on one port and one store, however often it is killed."""

    def __init__(self, folder):
        (self.port,) = free_ports(1)
        self.url, self.folder = f"http://127.0.0.1:{self.port}", folder

    def start(self):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            cwd=self.folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while self.process.poll() is None:
            try:
                return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.1)
        raise ChildProcessError("mlflow server ended")

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def train(cell, halfway=lambda: None):
    """As the stage `train` tells of a training of 25 steps."""
    with tracking.policy_run(PARAMS, cell, TABLE) as run_id:
        log = StepLog(run_id)
        for number in range(1, 26):
            log.on_log(None, SimpleNamespace(global_step=number), None, {"loss": 1 / number})
            if number == 15:
                halfway()
        log.on_train_end(None, None, None)
        logging.getLogger("dpo").warning("%s runs away", cell.key)
        tracking.tag_checkpoint(run_id, policy_folder(cell))
    return run_id


def evaluate(cell):
    tracking.log_evaluation(PARAMS, cell, TABLE, {"kl": 1.5, "kl_ci": [1.0, 2.0]}, TABLE)


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
    """One cell trained with the server, one half with it, one without; the rest of the pipeline without it."""
    folder = tmp_path_factory.mktemp("outage")
    server, told = Server(folder), SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", server.url)
        for path in (
            "data/train.parquet",
            "data/eval.parquet",
            "data/preferences.parquet",
            "reference/train/manifest.json",
            REPORT,
            COMPARISON,
        ):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            TABLE.to_parquet(path)
        for cell in (BEFORE, MIDDLE, WITHOUT, BESIDE):
            policy_folder(cell).mkdir(parents=True)
            (policy_folder(cell) / "model.safetensors").write_text(cell.key)
        server.start()
        try:
            told.before = train(BEFORE)
            told.middle = train(MIDDLE, halfway=server.kill)
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # it was waited for, once; now the test goes on
            with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI: .* connection refused"):
                deliver.main()
            told.without = train(WITHOUT)
            patch.setattr(spool, "git_tags", lambda: {"git_commit": "later"})
            for cell in (BEFORE, MIDDLE, WITHOUT):
                evaluate(cell)
            tracking.log_validation(PARAMS, {"rows": 7}, [Path("data/train.parquet")])
            figure = go.Figure(layout={"title": {"text": "Frontier"}})
            tracking.log_comparison(PARAMS, {"policy": {"kl": 1.5}}, WITHOUT.key, "why", [figure])

            server.start()
            told.cuts = 0
            for number in range(3, 500, 4):
                with pytest.MonkeyPatch.context() as cut:
                    cut.setattr(rest_utils, "_get_http_response_with_retries", after(number))
                    if spool.connect_or_spool():
                        break
                    told.cuts += 1
            deliver.main()
            yield told
        finally:
            server.kill()


@pytest.fixture
def runs(story):
    assert spool.connect_or_spool()
    return {run.info.run_name: run for run in every_run()}


def every_run():
    return mlflow.search_runs(experiment_names=[spool.EXPERIMENT], output_format="list")


def history(run, name):
    return [(p.step, p.value) for p in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)]


def files(run):
    client = mlflow.MlflowClient()
    return {file.path for file in client.list_artifacts(run.info.run_id)}


def test_each_run_is_there_once_though_the_delivery_was_cut_off_again_and_again(story, runs):
    assert story.cuts > 5
    names = Counter(run.info.run_name for run in every_run())
    cells = {cell.key: 1 for cell in (BEFORE, MIDDLE, WITHOUT)}
    (sweep,) = (name for name in names if name.startswith("sweep"))
    assert names == cells | {"data": 1, sweep: 1}
    assert {run.info.status for run in every_run()} == {"FINISHED"}


@pytest.mark.parametrize("cell", [BEFORE, MIDDLE, WITHOUT], ids=["before", "middle", "without"])
def test_a_policys_run_is_whole_wherever_it_was_written(runs, cell):
    run = runs[cell.key]
    assert sorted(history(run, "train/loss")) == [(n, 1 / n) for n in range(1, 26)]
    assert run.data.metrics["train/loss"] == 1 / 25
    assert {k: history(run, f"eval/{k}") for k in ("kl", "kl_low", "kl_high")} == {
        "kl": [(0, 1.5)], "kl_low": [(0, 1.0)], "kl_high": [(0, 2.0)]
    }  # fmt: skip
    assert run.data.params["seed"] == str(cell.seed)
    assert run.data.params["engine.precision"] == PARAMS.engine.precision
    assert run.data.tags[tracking.ALARMS] == f"{cell.key} runs away\n"
    assert run.data.tags[spool.CHECKPOINT] == tracking.weights(policy_folder(cell))
    assert run.data.tags["git_commit"] == "none"
    sweep = next(run for name, run in runs.items() if name.startswith("sweep"))
    assert run.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert {data.dataset.name for data in run.inputs.dataset_inputs} == {"train", "eval"}
    assert files(run) == {"samples.json"}


def test_the_ids_that_provenance_names_are_found(story, runs):
    assert runs[BEFORE.key].info.run_id == story.before
    assert runs[MIDDLE.key].info.run_id == story.middle
    assert runs[WITHOUT.key].data.tags[spool.SPOOLED] == story.without


def test_times_are_those_of_the_training_and_not_of_the_delivery(story, runs):
    spooled = mlflow.MlflowClient(spool.SPOOL).get_run(story.without)
    for name in ("start_time", "end_time", "status"):
        assert getattr(runs[WITHOUT.key].info, name) == getattr(spooled.info, name)


def test_the_comparison_is_in_the_sweep_that_the_server_knew(runs):
    sweep = next(run for name, run in runs.items() if name.startswith("sweep"))
    assert history(sweep, "policy/kl") == [(0, 1.5)]
    assert sweep.data.tags["dpo.selected"] == WITHOUT.key
    assert sweep.data.tags["mlflow.note.content"] == "why"
    assert sweep.data.params["seed"] == str(PARAMS.seed)
    assert files(sweep) == {REPORT.name, COMPARISON.name, "figures"}
    assert history(runs["data"], "data/rows") == [(0, 7.0)]
    assert files(runs["data"]) == {"train.parquet"}


def test_a_training_that_goes_on_in_the_spool_is_delivered_as_far_as_it_is_and_then_whole(story, runs):
    seen = []

    def go_without():
        spool._use_spool(os.environ["MLFLOW_TRACKING_URI"], OSError("it was down"))

    def deliver_beside():  # as another stage does, which started when the server was back
        assert spool.connect_or_spool()
        seen.extend(run for run in every_run() if run.info.run_name == BESIDE.key)
        go_without()

    with pytest.MonkeyPatch.context() as outage:
        outage.setattr(tracking, "connect_or_spool", go_without)
        run_id = train(BESIDE, halfway=lambda: (outage.undo(), deliver_beside()))
    (partial,) = seen
    assert partial.info.status == "RUNNING"
    assert partial.data.metrics["train/loss"] == 1 / 10
    assert spool.connect_or_spool()
    (whole,) = (run for run in every_run() if run.info.run_name == BESIDE.key)
    assert whole.info.run_id == partial.info.run_id
    assert whole.data.tags[spool.SPOOLED] == run_id
    assert whole.info.status == "FINISHED"
    assert sorted(history(whole, "train/loss")) == [(n, 1 / n) for n in range(1, 26)]


def test_a_server_that_refuses_is_an_error_and_no_outage(story, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", os.environ["MLFLOW_TRACKING_URI"] + "/elsewhere")
    with pytest.raises(mlflow.MlflowException, match="404"):
        spool.connect_or_spool()
