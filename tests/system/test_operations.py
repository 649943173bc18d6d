"""Schedules, deployments and servers as a user starts them, with real servers and a real worker."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image
from ruamel.yaml import YAML

from flows import artifacts, processes
from tasks.common import addresses
from tasks.tracking.runs import RESUMED
from tests.support.operations import DVC_YAML, Project, processes_in, wait_for
from tests.support.project import ROOT, TRIAL, change, make_project
from tools.browser import screenshot
from tools.screens import prefect_pages


def command_of(process: psutil.Process) -> list[str]:
    """Return the command of a process, empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def roots_in(folder: Path) -> set[int]:
    """Return the process ids of the servers and the worker, without their children."""
    pids = {process.pid: process.ppid() for process in processes_in(folder)}
    return {pid for pid, parent in pids.items() if parent not in pids}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Project]:
    """A running project."""
    place = tmp_path_factory.mktemp("operations")
    try:
        yield (project := Project(place, tiny_model_dir))
        project.servers("down")
    finally:
        for left in processes_in(place / "dpo-pipeline"):
            left.kill()


def test_a_scheduled_run_starts_and_completes(project):
    def completed() -> list[Any]:
        return [run for run in project.runs("pipeline") if run["state_name"] == "Completed"]

    wait_for(lambda: bool(completed()))
    run = completed()[0]
    assert run["auto_scheduled"]
    assert run["created_by"]["type"] == "SCHEDULE"
    head = project.execute("git", "rev-parse", "--short", "HEAD").strip()
    assert run["deployment_version"] == head
    assert (project.folder / "compared.txt").read_text() == "ten\nten\n"
    stages = project.ask("POST", "task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
    assert sorted(stage["name"] for stage in stages) == ["compare", "train@0.1", "train@0.5", "validate"]
    found = project.ask("POST", "artifacts/filter", flow_runs={"id": {"any_": [run["id"]]}})
    shown = {artifact["key"]: artifact["data"] for artifact in found if artifact["key"]}
    shown = {key.removeprefix(f"{project.name}-"): page for key, page in shown.items()}
    assert set(shown) == {"compare", "train-0-1", "train-0-5", "validate"}
    assert shown["validate"].endswith("\n\n## Ten pairs are valid")
    assert "| selected | null |" in shown["compare"]
    project.pause()


def test_deployments_and_forms_match_the_flows(project):
    retrain = project.deployment("retrain")
    (nightly,) = retrain["schedules"]
    assert (nightly["schedule"]["cron"], nightly["schedule"]["timezone"]) == ("0 2 * * *", "UTC")
    for name in ("pipeline", "retrain", "sweep", "rollback"):
        deployment = project.deployment(name)
        assert deployment["work_pool_name"] == project.name
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        assert set(deployment["parameters"]) <= set(deployment["parameter_openapi_schema"].get("properties", {}))
        check, step = deployment["pull_steps"]
        assert (
            f'test "$DPO_PROJECT" = "{project.name}"'
            in check["prefect.deployments.steps.run_shell_script"]["script"]
        )
        assert list(step.values()) == [{"directory": "{{ $DPO_WORKSPACE }}"}], "the folder is set by each worker"
    form = project.deployment("sweep")["parameter_openapi_schema"]["properties"]
    assert form["betas"]["description"] == "strengths of the KL constraint."
    assert "sigmoid" in json.dumps(form["losses"])
    assert retrain["parameter_openapi_schema"]["required"] == ["landing"]
    assert retrain["parameters"]["landing"] == "data/landing", "the folder of the README"


@pytest.mark.slow
def test_the_retrain_deployment_takes_in_new_files(project):
    first = project.submit("retrain")
    assert project.await_run(first, "Kept")["state"]["message"].startswith(
        "1 file new, 0 files refused: No policy"
    )
    landed = [path.name[17:] for path in (project.folder / "data/own/landed").iterdir()]
    assert landed == ["pairs.jsonl"]
    subjects = project.execute("git", "log", "--format=%s").splitlines()
    assert subjects[:2] == ["Retrain on 1 file", "Add 1 file to the data"]
    assert len(subjects) == 4
    again = project.submit("retrain")
    assert project.await_run(again, "NothingNew")["state"]["type"] == "COMPLETED"


@pytest.mark.slow
def test_a_rollback_without_a_champion_is_an_error(project):
    project.execute("git", "add", "--all")
    project.execute("git", "commit", "--quiet", "--allow-empty", "--message", "Results")
    ended = project.await_run(project.submit("rollback"), "Failed")
    assert "dpo-policy has no champion" in ended["state"]["message"]


@pytest.mark.slow
def test_two_deployments_do_not_run_at_once(project):
    (project.folder / "pause.txt").write_text("3")
    first = project.submit("pipeline")
    project.await_run(first, "Running")
    second = project.submit("sweep", betas=[0.2, 0.3])
    ended = project.await_run(first, "Completed")["end_time"]
    assert project.await_run(second, "Completed")["start_time"] > ended
    assert "betas: [0.2, 0.3]" in project.execute("git", "diff", "params.yaml")


def test_files_of_the_servers_are_private(project):
    home = Path(project.environment["PREFECT_HOME"])
    files = [*(project.folder / ".servers").glob("*.log"), *home.glob("prefect.db*")]
    assert len(files) >= 4
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}


def test_artifacts_link_to_the_mlflow_server_of_the_worker(project, tmp_path, monkeypatch):
    servers_set = {process.environ().get(addresses.MLFLOW_PAGES) for process in processes_in(project.folder)}
    assert servers_set == {project.mlflow}
    experiment = httpx.post(f"{project.mlflow}/api/2.0/mlflow/experiments/create", json={"name": "linked"}).json()
    made = httpx.post(f"{project.mlflow}/api/2.0/mlflow/runs/create", json=experiment).json()["run"]["info"]
    (tmp_path / "provenance.json").write_text(json.dumps({"mlflow_run": made["run_id"]}))
    address = f"{project.mlflow}/#/experiments/{experiment['experiment_id']}/runs/{made['run_id']}"
    monkeypatch.setenv(addresses.MLFLOW_PAGES, project.mlflow)
    assert artifacts.mlflow_link(tmp_path / "provenance.json") == f"[run {made['run_id']}]({address})"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1/")
    assert artifacts.mlflow_link(tmp_path / "provenance.json") == f"run `{made['run_id']}`"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_screenshots_of_prefect(project, tmp_path):
    shown = {
        "prefect-run": ["pipeline", "4 Task runs", "Completed", "'validate'"],
        "prefect-stage": ["compare", "metrics/comparison.json", "No policy shows more than its reference."],
        "prefect-artifacts": ["validate", "train-0-1", "train-0-5", "compare"],
        "prefect-form": [
            "losses",
            "betas",
            "learning_rates",
            "seeds",
            "parallel",
            "strengths of the KL constraint",
        ],
    }
    addresses = prefect_pages(f"{project.url}/api")
    assert set(addresses) == set(shown)
    for name, url in addresses.items():
        text = screenshot(url, tmp_path / f"{name}.png", 1280, 900)
        assert [part for part in shown[name] if part not in text] == [], name
        assert len(Image.open(tmp_path / f"{name}.png").convert("RGB").getcolors(2**24)) > 100


POLICY = f"models/{TRIAL}/model.safetensors"
UNINTERRUPTED = f"""
import sys
from importlib import import_module
for name in ("fetch_model", "ingest", "validate", "tokens", "sft", "reference_logprobs", "train"):
    sys.argv = [name] if name != "train" else [name, "{TRIAL}"]
    import_module(f"tasks.{{name}}").main()
"""


def prepare_training(project: Project, place: Path, model: Path) -> bytes:
    """Copy the inputs of a training of 480 steps to the project and leave only the train stage.

    Return the weights of an uninterrupted training. Schedules are paused.
    """
    project.pause()
    done = make_project(place, model)
    change(done, {"dpo.pairs_per_step": 1, "dpo.epochs": 20})
    command = [sys.executable, "-c", UNINTERRUPTED]
    subprocess.run(command, cwd=done, env=project.environment, check=True, capture_output=True)
    change(done, {"run.checkpoint_minutes": 0})
    for name in ("data", "tokens", "models/reference", "reference"):
        shutil.copytree(done / name, project.folder / name, dirs_exist_ok=True)
    shutil.copy(done / "params.yaml", project.folder / "params.yaml")
    ours = YAML().load(ROOT / "dvc.yaml")
    ours["stages"] = {"train": ours["stages"]["train"]}
    YAML().dump(ours, project.folder / "dvc.yaml")
    return (done / POLICY).read_bytes()


@pytest.mark.slow
def test_training_resumes_from_its_last_checkpoint_after_the_worker_is_killed(project, tmp_path, tiny_model_dir):
    uninterrupted = prepare_training(project, tmp_path, tiny_model_dir)

    def last_step() -> int:
        found = (project.folder / f".training-progress/{TRIAL}").glob("*/checkpoint-*/sha256.json")
        return max((int(file.parent.name.rpartition("-")[2]) for file in found), default=0)

    def trainings() -> list[psutil.Process]:
        return [process for process in processes_in(project.folder) if command_of(process)[-2:] == command]

    def train_until(step: int) -> str:
        run = project.submit("pipeline")
        wait_for(lambda: last_step() >= step)
        assert len(trainings()) == 1
        return run

    def family() -> list[psutil.Process]:
        worker = psutil.Process(json.loads((project.folder / ".servers/worker.json").read_text())["pid"])
        return [worker, *worker.children(recursive=True)]

    command = ["tasks.train", TRIAL]
    run = train_until(20)
    worker, *others = family()
    worker.kill()
    assert trainings()[0] in others, "training survives the death of the worker"
    project.servers("up")
    assert project.ask("GET", f"flow_runs/{run}")["state_name"] == "Crashed"
    assert not psutil.wait_procs(others, timeout=0)[1], "no old process disturbs the next run"

    first = last_step()
    run = train_until(first + 20)
    for process in (killed := family()):
        process.kill()
    assert not psutil.wait_procs(killed, timeout=30)[1]
    second = last_step()
    change(project.folder, {"run.checkpoint_minutes": 5})
    assert "worker   was stopped during flow run" in project.servers("up")
    project.await_run(project.submit("pipeline"), "Completed")
    assert (project.folder / POLICY).read_bytes() == uninterrupted
    client = MlflowClient(f"sqlite:///{project.folder}/mlflow.db")
    found = client.search_runs(["1"], f"tags.`dpo.trial` = '{TRIAL}'", order_by=["start_time"])
    resumed = [int(run.data.tags.get(RESUMED, 0)) for run in found]
    assert resumed == [0, first, second]
    (project.folder / "dvc.yaml").write_text(DVC_YAML)
    wait_for(lambda: len(family()) == 1)


@pytest.mark.slow
def test_a_silent_worker_is_restarted(project):
    def worker() -> psutil.Process:
        return psutil.Process(json.loads((project.folder / ".servers/worker.json").read_text())["pid"])

    project.pause()
    (silent := worker()).suspend()
    time.sleep(40)
    code = "from flows import servers; servers.SILENT_SECONDS = 30.0; servers.up()"
    output = project.execute(sys.executable, "-c", code)
    assert "worker   has sent no heartbeat for 30 seconds; it is restarted" in output
    assert not processes.is_running(silent)
    assert worker().pid != silent.pid
    (project.folder / "pause.txt").write_text("0")
    project.await_run(project.submit("pipeline"), "Completed")


@pytest.mark.slow
def test_a_second_up_starts_nothing_and_down_stops_everything(project):
    project.pause()
    wait_for(lambda: all(run["state_type"] not in ("PENDING", "RUNNING") for run in project.runs("pipeline")))
    (project.folder / "pause.txt").write_text("300")  # only now: a scheduled run would keep the slot
    added = f"deployments/{project.deployment('sweep')['id']}/schedules"
    httpx.post(f"{project.url}/api/{added}", json=[{"schedule": {"cron": "0 3 * * *"}}]).raise_for_status()
    before = roots_in(project.folder)
    output = project.servers("up")
    assert "sweep    removed a schedule that is not in prefect.yaml" in output
    assert project.ask("GET", added) == []
    paused = {name: project.deployment(name)["paused"] for name in ("pipeline", "retrain", "sweep")}
    assert paused == {"pipeline": True, "retrain": True, "sweep": False}
    assert re.findall(r"(\w+) +is already running", output) == ["prefect", "mlflow", "worker"]
    assert roots_in(project.folder) == before
    assert httpx.get(f"http://127.0.0.1:{project.ports[1]}/health").is_success
    interrupted = project.submit("pipeline")
    wait_for(lambda: any(process.name() == "sleep" for process in processes_in(project.folder)))
    waiting = project.submit("pipeline")
    stranger = subprocess.Popen(["sleep", "60"], cwd=project.folder, start_new_session=True)
    try:
        project.servers("down")
        assert processes_in(project.folder) == []
        assert waiting not in (project.folder / ".servers/worker.log").read_text(), "a run was started during down"
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    assert project.execute("git", "status", "--porcelain", ".servers") == ""
    assert "is not running" in project.servers("down")
    project.servers("up")
    assert project.await_run(interrupted, "Crashed"), "stored data is kept, and no run blocks the pool"
