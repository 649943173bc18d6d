"""MLflow that answers but refuses: a stage ends before its work, with one line that names the command."""

import os
import re
import shutil
import subprocess
import sys

import mlflow
import pytest

from dpo.common.errors import InputError
from tasks.tracking import offline
from tests.support.project import ENV, ROOT

STAGES = ["sft", "train sigmoid-0.1-7e-05-17", "evaluate sigmoid-0.1-7e-05-17", "compare", "validate"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_ends_before_its_work_if_the_store_is_a_folder(tmp_path, stage):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    name, *trial = stage.split()
    done = subprocess.run(
        [sys.executable, "-m", f"tasks.{name}", *trial],
        cwd=tmp_path, env={**ENV, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "./mlruns"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: MLFLOW_TRACKING_URI: ./mlruns: MLflow no longer supports a folder as a store; ")
    assert "`unset MLFLOW_TRACKING_URI`" in line
    assert "Traceback" not in done.stderr


def test_the_error_for_a_deleted_experiment_names_the_command_that_restores_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    offline.connect()
    client = mlflow.MlflowClient()
    client.delete_experiment(client.get_experiment_by_name(offline.EXPERIMENT).experiment_id)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"the experiment dpo-pipeline is deleted; restore it: `.*`$") as error:
        offline.connect_or_offline()
    (command,) = re.findall("`(.*)`", str(error.value))
    environment = {**os.environ, "PATH": ENV["PATH"]}
    environment.pop("MLFLOW_TRACKING_URI", None)
    subprocess.run(["sh", "-c", command], env=environment, check=True, capture_output=True)
    offline.connect()


def test_a_missing_driver_is_one_line_with_the_command_and_without_password(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # as if it were not installed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://someone:canary@127.0.0.1:1/mlflow")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1/mlflow: .*psycopg2 .*`pip install -e") as error:
        offline.connect_or_offline()
    assert not re.search("someone|canary", str(error.value))
