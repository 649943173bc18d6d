"""Identity of a checkout: names, copies, moves, two clones side by side, and slots of lost runs."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from prefect.states import Running

from flows import slots
from flows.identity import project
from tasks.tracking import offline
from tests.support.models import free_ports
from tests.support.operations import Project, processes_in, wait_for
from tests.support.project import ENV, ROOT, execute


def test_a_moved_checkout_keeps_its_name_and_a_copy_gets_another(tmp_path, monkeypatch):
    first = tmp_path / "My Pipeline"
    first.mkdir()
    monkeypatch.chdir(first)
    name = project()
    assert name.startswith("my-pipeline-")
    assert project() == name
    shutil.copytree(first, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert project() != name
    moved = first.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert project() == name


MAKE = """
from mlflow import MlflowClient
from tasks.tracking import offline
offline.connect()
run, client = offline.new_run("run", {}), MlflowClient()
client.log_text(run, "weights", "model/weights.txt")
client.create_registered_model("dpo-policy")
client.create_model_version("dpo-policy", f"{client.get_run(run).info.artifact_uri}/model", run_id=run)
print(run)
"""
READ = """
import sys, mlflow
from tasks.tracking import offline
offline.connect()
print(mlflow.artifacts.load_text(f"runs:/{sys.argv[1]}/model/weights.txt"))
print(mlflow.MlflowClient().get_run(sys.argv[1]).info.artifact_uri)
print(mlflow.MlflowClient().get_model_version("dpo-policy", "1").source)
"""


def test_the_store_of_a_moved_checkout_is_rewritten_at_the_first_connection(tmp_path):
    def python(code: str, *arguments: str) -> tuple[list[str], str]:
        env = {**ENV, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
        return done.stdout.splitlines(), done.stderr

    folder = tmp_path / "100% first"
    folder.mkdir()
    (run,), _ = python(MAKE)
    server = subprocess.Popen(["sleep", "60"], env=os.environ | {"DPO_WORKSPACE": str(folder)})
    try:
        former, folder = folder, folder.rename(tmp_path / "second")
        (text, artifacts, source), errors = python(READ, run)
        assert text == "weights"
        assert artifacts.startswith(f"{folder}/mlruns/")
        assert source == f"{artifacts}/model"
        assert f"the paths of {former} are now those of {folder}" in errors
        assert f"still running from {former}: process {server.pid} (sleep); stop them" in errors
        assert "the paths of" not in python(READ, run)[1]
    finally:
        server.kill()
        server.wait()


def test_a_store_outside_of_the_checkout_is_kept(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    for folder in (first, second):
        monkeypatch.chdir(folder)
        offline.connect()
    found = MlflowClient().get_experiment_by_name(offline.EXPERIMENT)
    assert found.artifact_location.startswith(f"{first}/mlruns/")


@pytest.mark.parametrize(("alive", "hours", "freed"), [(True, 99, False), (True, 1, True), (False, 99, True)])
def test_a_run_without_a_process_or_beyond_the_limit_frees_its_slot(monkeypatch, alive, hours, freed):
    monkeypatch.setattr("flows.processes.GRACE_SECONDS", 1.0)
    begun = datetime.now(UTC) - timedelta(hours=2)
    run = SimpleNamespace(id=uuid4(), name="night", state=Running(timestamp=begun), start_time=begun)
    states = {}
    client = SimpleNamespace(
        read_flow_runs=lambda **_: [run],
        set_flow_run_state=lambda identity, state, force: states.update({identity: state}),
    )
    process = subprocess.Popen(["sleep", "60"], env=os.environ | {slots.WORKERS_RUN: str(run.id) if alive else ""})
    try:
        lines = list(slots.release_slots(client, "pool", hours))
        assert bool(states) is bool(lines) is freed
        if freed:
            assert states[run.id].is_crashed()
        time.sleep(0.1)
        assert (process.poll() is None) is (not (alive and freed))
    finally:
        process.kill()
        process.wait()


def test_a_server_that_does_not_answer_is_reported_with_the_command(tmp_path):
    env = {
        "PREFECT_API_URL": f"http://someone:canary@127.0.0.1:{free_ports(1)[0]}/api",
        "PREFECT_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "flows.pipeline"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "does not answer; start it with `make up`" in line
    assert "canary" not in line


@pytest.mark.slow
def test_two_clones_run_side_by_side(tmp_path, tiny_model_dir):
    """Neither sees the other's runs; a foreign database and a foreign worker are refused."""
    places = [tmp_path / "one", tmp_path / "two"]
    clones: list[Project] = []
    try:
        for place in places:
            place.mkdir()
            clones.append(Project(place, tiny_model_dir))
            clones[-1].pause()
        first, second = clones
        assert first.name != second.name
        run = first.submit("pipeline")
        first.await_run(run, "Completed")
        assert not any(found["id"] == run for found in second.runs("pipeline"))
        assert second.name not in {pool["name"] for pool in first.ask("POST", "work_pools/filter")}

        second.servers("down")
        home = {"PREFECT_HOME": first.environment["PREFECT_HOME"]}
        done = subprocess.run(
            [sys.executable, "-m", "flows.servers", "up"], cwd=second.folder,
            env=second.environment | home, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stdout + done.stderr
        assert f"Prefect's database belongs to another checkout, {first.folder}" in done.stderr
        assert not (second.folder / ".servers/prefect.json").exists()

        worker = json.loads((first.folder / ".servers/worker.json").read_text())
        os.kill(worker["pid"], 9)
        log = (tmp_path / "foreign.log").open("w")
        foreign = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", first.name, "--type", "process"],
            env=first.environment | {"PREFECT_API_URL": f"{first.url}/api"}, cwd=tmp_path,
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            refused = first.submit("pipeline")
            wait_for(lambda: first.ask("GET", f"flow_runs/{refused}")["state_type"] in ("FAILED", "CRASHED"))
            said = (tmp_path / "foreign.log").read_text()
            assert f"this worker is not the one of the checkout {first.name}" in said
            assert "start the right one with: make up" in said
        finally:
            foreign.kill()
            foreign.wait()
        first.servers("up")
        first.await_run(first.submit("pipeline"), "Completed")
        first.servers("down")
        name, first.folder = first.name, first.folder.rename(tmp_path / "moved")
        first.servers("up")
        assert first.name == name
        first.await_run(first.submit("pipeline"), "Completed")
    finally:
        for clone in clones:
            execute(clone.folder, sys.executable, "-m", "flows.servers", "down")
            for left in processes_in(clone.folder):
                left.kill()
