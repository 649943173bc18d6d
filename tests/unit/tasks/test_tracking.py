"""MLflow runs of trainings: step curves, resumed and interrupted runs, warnings."""

import dataclasses
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from dpo.config import load_params
from dpo.training.callbacks import DivergenceAlarm
from dpo.training.losses import Sigmoid
from dpo.training.settings import EarlyStopSettings, Trial
from tasks.common.flatten import flatten
from tasks.common.paths import policy_folder
from tasks.common.training_log import write_training_log
from tasks.tracking import offline, run_logger
from tasks.tracking import runs as tracking
from tasks.tracking.steplog import StepLog

ROOT = Path(__file__).parents[3]
PARAMS = load_params(ROOT / "params.yaml")
TABLE = pd.DataFrame({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]})

WRITER = """
import multiprocessing, sys
from tasks.tracking.steplog import StepLog
from tasks.tracking.runs import policy_run
from tests.unit.tasks.test_tracking import PARAMS, trial

def write(seed, together):
    with policy_run(PARAMS, trial(seed)) as run_id:
        log = StepLog(run_id)
        log.STEPS_PER_CALL = 1
        together.wait(timeout=300)
        for step in range(1, 51):
            log.on_log({"step": step, "loss": seed + step, "margin": -step})
        log.on_end()

context = multiprocessing.get_context("fork")
together = context.Barrier(8)
writers = [context.Process(target=write, args=(seed, together)) for seed in range(8)]
for writer in writers: writer.start()
for writer in writers: writer.join()
sys.exit(max(writer.exitcode for writer in writers))
"""


def trial(seed):
    return Trial(loss=Sigmoid(), beta=0.1, learning_rate=1e-5, seed=seed)


def make_project(folder):
    for name in ("train", "eval", "raw_pairs"):
        (folder / "data").mkdir(exist_ok=True)
        TABLE.to_parquet(folder / "data" / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("tracking"))


@pytest.fixture
def project(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    return folder


def curve(run_id, name):
    points = mlflow.MlflowClient().get_metric_history(run_id, f"train/{name}")
    return [(point.step, point.value) for point in sorted(points, key=lambda point: point.step)]


@pytest.mark.slow
def test_eight_concurrent_trainings_log_all_points_to_a_new_sqlite_store(project):
    done = subprocess.run(
        [sys.executable, "-c", WRITER], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    offline.connect()
    runs = mlflow.search_runs(experiment_names=[offline.EXPERIMENT], output_format="list")
    policies = [run for run in runs if tracking.TRIAL in run.data.tags]
    assert len(runs) == 9
    assert len(policies) == 8
    assert {run.data.tags["mlflow.parentRunId"] for run in policies} == {tracking.sweep_run(PARAMS)}
    for run in policies:
        assert run.info.status == "FINISHED"
        seed = int(run.data.params["seed"])
        assert curve(run.info.run_id, "loss") == [(n, seed + n) for n in range(1, 51)]
        assert curve(run.info.run_id, "margin") == [(n, -n) for n in range(1, 51)]


def test_a_clock_that_jumps_back_keeps_all_steps_in_order(project, monkeypatch):
    times = iter([2e9, 2e9, 1e9, 1e9, 1.5e9])
    with tracking.reference_run(PARAMS) as run_id:
        log = StepLog(run_id)
        for number in range(1, 6):
            now = next(times)
            monkeypatch.setattr(time, "time", lambda now=now: now)
            log.on_log({"step": number, "loss": 1 / number})
        log.on_end()
    assert curve(run_id, "loss") == [(n, 1 / n) for n in range(1, 6)]
    assert mlflow.get_run(run_id).data.metrics["train/loss"] == 1 / 5


def test_the_run_of_a_resumed_training_has_the_steps_before_the_checkpoint(project):
    history = [{"loss": 1 / n, "rewards/margins": n, "epoch": n / 9, "step": n} for n in range(1, 4)]
    history[-1]["eval_loss"] = 0.5
    with tracking.reference_run(PARAMS) as run_id:
        log = StepLog(run_id)
        log.on_start(3, history)
        assert mlflow.get_run(run_id).data.metrics["train/loss"] == 1 / 3, "sent before the first step"
        log.on_log({"step": 4, "loss": 1 / 4})
        log.on_end()
    run = mlflow.get_run(run_id)
    assert curve(run_id, "loss") == [(n, 1 / n) for n in range(1, 5)]
    assert curve(run_id, "rewards/margins") == [(n, n) for n in range(1, 4)]
    assert curve(run_id, "eval_loss") == [(3, 0.5)]
    assert "train/train_runtime" not in run.data.metrics
    assert "train/step" not in run.data.metrics
    assert run.data.tags[tracking.RESUMED] == "3"


def test_records_of_a_training_of_100_000_steps_stay_small(project, monkeypatch, caplog):
    alarm, calls = DivergenceAlarm(), []
    entries = [
        {"step": step, "loss": 1.0 / step, "grad_norm": 1.0, "logratios/chosen": 200.0 * (step > 500)}
        for step in range(1, 100_001)
    ]
    entries[12_344]["eval_loss"] = 0.5
    with tracking.reference_run(PARAMS) as run_id:
        log = StepLog(run_id)
        monkeypatch.setattr(log.run, "log_metrics", calls.append)
        for entry in entries:
            for callback in (alarm, log):
                callback.on_log(entry)
        log.on_log({"step": 100_000, "train_runtime": 9.0})
        log.on_end()
    points = [point for call in calls for point in call]
    steps = [point.step for point in points if point.key == "train/loss"]
    assert steps[:999] == list(range(1, 1000))
    assert steps[-901:] == sorted({*range(10_100, 100_000, 100), 12_345, 100_000})
    assert [(point.step, point.value) for point in points if point.key == "train/eval_loss"] == [(12_345, 0.5)]
    assert points[-1].key == "train/train_runtime"
    assert len(steps) < 3000
    assert len(calls) < 2000
    assert max(map(len, calls)) < 60
    assert len(caplog.records) == 17, "the steps 501, 502, 504, 508, ..."
    write_training_log(Path("log.csv"), entries)
    assert pd.read_csv("log.csv")["step"].tolist() == steps


def test_a_training_that_starts_at_step_0_is_not_tagged_as_resumed(project):
    with tracking.reference_run(PARAMS) as run_id:
        StepLog(run_id).on_start(0, [])
    assert tracking.RESUMED not in mlflow.get_run(run_id).data.tags


def test_warnings_of_the_library_during_a_training_are_in_its_run(project, caplog):
    library = logging.getLogger("dpo.training.train")
    library.warning("before")
    with tracking.policy_run(PARAMS, trial(99)) as run_id:
        library.warning("step %d: runs away", 7)
        assert mlflow.get_run(run_id).data.tags[run_logger.WARNINGS] == "step 7: runs away\n"
        library.info("all is well")
        library.warning("x" * 2 * run_logger.WARNINGS_LENGTH)
        library.warning("beyond the tag")
    library.warning("after")
    found = mlflow.get_run(run_id).data.tags[run_logger.WARNINGS]
    assert found == ("step 7: runs away\n" + "x" * 9999)[: run_logger.WARNINGS_LENGTH]
    messages = [record.getMessage() for record in caplog.records if record.name == library.name]
    assert [messages[0], messages[-1]] == ["before", "after"]


def test_an_evaluation_does_not_change_the_duration_of_the_training(project):
    folder = policy_folder(trial(98))
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    with tracking.policy_run(PARAMS, trial(98)) as run_id:
        tracking.tag_checkpoint(run_id, folder)
    ended = mlflow.get_run(run_id).info.end_time
    time.sleep(0.01)
    tracking.log_evaluation(PARAMS, trial(98), {"kl": 1.5}, TABLE)
    run = mlflow.get_run(run_id)
    assert (run.data.metrics["eval/kl"], run.info.end_time, run.info.status) == (1.5, ended, "FINISHED")


def test_the_run_of_a_failed_training_has_the_status_failed(project):
    runs = []
    with pytest.raises(ZeroDivisionError):
        fail(runs)
    assert mlflow.get_run(runs[0]).info.status == "FAILED"


def test_an_interrupted_run_is_marked_as_killed_when_its_stage_runs_again(project):
    def begin():
        with (
            tracking.reference_run(PARAMS) as reference,
            tracking.policy_run(PARAMS, trial(71)) as policy,
        ):
            tracking.log_validation(PARAMS, {}, [])
        return [reference, policy, *data_runs()]

    def data_runs():
        runs = mlflow.search_runs(filter_string=f"tags.`{offline.ROLE}` = 'data'", output_format="list")
        return [run.info.run_id for run in runs]

    client = mlflow.MlflowClient()
    ours = begin()
    with tracking.reference_run(dataclasses.replace(PARAMS, seed=PARAMS.seed + 1)) as theirs:
        pass
    for run in (*ours, theirs):
        client.update_run(run, "RUNNING")
    begin()
    assert [mlflow.get_run(run).info.status for run in ours] == ["KILLED"] * 3
    assert mlflow.get_run(theirs).info.status == "RUNNING", "the run of another training, which may be running"


def fail(runs):
    with tracking.reference_run(PARAMS) as run_id:
        runs.append(run_id)
        raise ZeroDivisionError


def test_a_warning_is_printed_if_logging_is_not_configured():
    code = (
        "import logging; from unittest.mock import Mock; from tasks.tracking.run_logger import WarningsHandler\n"
        "logging.getLogger('dpo').addHandler(WarningsHandler(Mock()))\n"
        "logging.getLogger('dpo.training.train').warning('runs %s', 'away')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.splitlines()[-1] == "runs away"


def test_a_store_whose_creation_was_interrupted_is_created_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code = (
        "import os; from tasks.tracking import offline\n"
        "offline.MlflowClient.search_experiments = lambda *_, **__: os._exit(9)\n"
        "offline.connect()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 9
    assert not Path("mlflow.db").exists()
    assert list(tmp_path.glob(".mlflow.db*.partial"))
    offline.connect()
    assert mlflow.get_experiment_by_name(offline.EXPERIMENT) is not None
    assert not list(tmp_path.glob(".mlflow.db*.partial"))


def test_flatten_yields_paths_through_mappings_and_dataclasses():
    stop = EarlyStopSettings(validation_share=0.1, every_steps=20, patience=3)
    nested = {"seed": 1, "stop": stop, "rules": {"pii": {"action": "warn"}, "none": {}}, "files": ["a", "b"]}
    assert list(flatten(nested)) == [
        (("seed",), 1),
        (("stop", "validation_share"), 0.1),
        (("stop", "every_steps"), 20),
        (("stop", "patience"), 3),
        (("rules", "pii", "action"), "warn"),
        (("files",), ["a", "b"]),
    ]


def test_validation_metrics_are_logged_by_path_with_their_intervals(project):
    metrics = {"rows": 7, "sources": {"https://a b": {"rows": 3}}, "share": 0.5, "share_ci": [0.4, 0.6]}
    metrics |= {"win_rate/a_cite": 0.7, "win_rate/a_cite_ci": [0.6, 0.8]}
    tracking.log_validation(PARAMS, metrics | {"errors": ["none"], "unit": "tokens", "kl_ci": None}, [])
    runs = mlflow.search_runs(filter_string=f"tags.`{offline.ROLE}` = 'data'", output_format="list")
    assert runs[0].data.metrics == {
        "data/rows": 7, "data/sources/https...a b/rows": 3, "data/share": 0.5, "data/share_low": 0.4,
        "data/share_high": 0.6, "data/win_rate.a_cite": 0.7, "data/win_rate.a_cite_low": 0.6,
        "data/win_rate.a_cite_high": 0.8,
    }  # fmt: skip
