"""Schedules, deployments and servers as a user starts them, with real servers and a real worker."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import httpx
import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from flows import artifacts, processes, servers, slots, sweep
from tasks.common import addresses
from tasks.tracking.provenance import FLOW_RUN
from tasks.tracking.registry import COMMIT, REGISTERED
from tasks.tracking.runs import RESUMED
from tests.support.models import free_ports
from tests.support.project import TRIAL, change, make_project
from tools.browser import screenshot
from tools.screens import mlflow_pages, prefect_pages

ROOT = Path(__file__).parents[2]
DVC_YAML = """
stages:
  validate:
    cmd: mkdir -p reports && echo '## Ten pairs are valid' > reports/validate.md && echo ten > valid.txt
    outs: [valid.txt]
  train:
    matrix: {beta: [0.1, 0.5]}
    cmd: cat valid.txt > ${item.beta}.txt && cat pause.txt && sleep $(cat pause.txt)
    deps: [valid.txt, pause.txt]
    outs: ["${item.beta}.txt"]
  compare:
    cmd: mkdir -p metrics && cat 0.1.txt 0.5.txt > compared.txt && cp comparison.json metrics
    deps: [0.1.txt, 0.5.txt]
    outs: [compared.txt]
    metrics: [{metrics/comparison.json: {cache: false}}]
"""
COMPARISON = {"selected": None, "reason": "No policy shows more than its reference.", "policies": {}}
FIVE_LINES = re.search(
    r"## Nightly retraining\n\n```sh\n(.*?)```", (ROOT / "docs/operations/retraining.md").read_text(), re.DOTALL
)


class Project:
    """A checkout with trivial stages, set up and started by the five lines of the README."""

    def __init__(self, place: Path, model: Path) -> None:
        self.folder = place / "dpo-pipeline"
        self.ports = free_ports(2)
        self.url = f"http://127.0.0.1:{self.ports[0]}"
        self.mlflow = f"http://127.0.0.1:{self.ports[1]}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(place / "prefect"),
            "PREFECT_PORT": str(self.ports[0]),
            "MLFLOW_PORT": str(self.ports[1]),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_WORKER_PREFETCH_SECONDS": "2",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": "3",
            "HF_HUB_OFFLINE": "1",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": f"url.{place}/origin/.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://git.example.org/team/",
            "GIT_CONFIG_KEY_1": "core.hooksPath",
            "GIT_CONFIG_VALUE_1": str(place / "hooks"),
        }
        for role in ("AUTHOR", "COMMITTER"):
            self.environment |= {f"GIT_{role}_NAME": "t", f"GIT_{role}_EMAIL": "t@example.org"}
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            self.environment.pop(name, None)
        (place / "hooks").mkdir()
        installed = place / "hooks/post-checkout"  # marks `make setup` as done, so that this environment is used
        installed.write_text("#!/bin/sh\nmkdir -p .venv && touch -d '1 hour' .venv/installed\n")
        installed.chmod(0o755)
        make_origin(place / "origin/dpo-pipeline.git", model, self.environment)
        pairs = [{"prompt": f"Of {n}?", "chosen": f"{n} is a joy.", "rejected": f"{n} bores.", "split": "train"}
                 for n in range(4)]  # fmt: skip
        (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        lines = FIVE_LINES[1].replace("/path/to/pairs.jsonl", str(place / "pairs.jsonl"))
        subprocess.run(["bash", "-ec", lines], cwd=place, env=self.environment, check=True)

    def execute(self, *command: str, **more: str) -> str:
        environment = self.environment | more
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    def servers(self, action: str) -> str:
        return self.execute(sys.executable, "-m", "flows.servers", action)

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """Send a request to Prefect's API and return the response; retry 503, which means a busy database."""
        for _ in range(20):
            answer = httpx.request(method, f"{self.url}/api/{path}", json=body or None, timeout=10)
            if answer.status_code != 503:
                break
            time.sleep(0.5)
        return answer.raise_for_status().json() if answer.content else None

    def deployment(self, name: str) -> Any:
        """Return a deployment by the name of its flow."""
        return self.ask("GET", f"deployments/name/{name}/{self.name}")

    @property
    def name(self) -> str:
        return str(json.loads((self.folder / ".prefect/project.json").read_text())["name"])

    def runs(self, name: str) -> Any:
        """Return the flow runs of a deployment, oldest first."""
        only = {"id": {"any_": [self.deployment(name)["id"]]}}
        return self.ask("POST", "flow_runs/filter", deployments=only, sort="START_TIME_ASC")

    def await_run(self, identity: str, state: str) -> Any:
        wait_for(lambda: self.ask("GET", f"flow_runs/{identity}")["state_name"] == state)
        return self.ask("GET", f"flow_runs/{identity}")

    def pause(self) -> None:
        """Pause the deployments that have schedules."""
        for name in ("pipeline", "retrain"):
            self.ask("PATCH", f"deployments/{self.deployment(name)['id']}", paused=True)

    def submit(self, name: str, **parameters: object) -> str:
        identity = self.deployment(name)["id"]
        return self.ask("POST", f"deployments/{identity}/create_flow_run", parameters=parameters)["id"]


def make_origin(folder: Path, model: Path, environment: dict[str, str]) -> None:
    """Make the repository to clone: a tiny model, trivial stages, the pipeline scheduled every minute."""
    folder.mkdir(parents=True)
    for name in ("dpo", "tasks", "flows", "functions"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "prefect.toml", "params.yaml", ".gitignore", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(model, folder / "models/own/tiny")
    change(folder, {"model.base": "models/own/tiny", "engine.max_length": 128})
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "pause.txt").write_text("0")
    (folder / "comparison.json").write_text(json.dumps(COMPARISON))
    with (folder / ".gitignore").open("a") as ignored:
        ignored.write("/valid.txt\n/0.?.txt\n/compared.txt\n")
    yaml = YAML()
    declared = yaml.load(folder / "prefect.yaml")
    declared["deployments"][0]["schedules"] = [{"cron": "* * * * *", "timezone": "UTC"}]
    yaml.dump(declared, folder / "prefect.yaml")
    add, commit = ["git", "add", "-A"], ["git", "commit", "-qm", "1"]
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], add, commit):
        subprocess.run(command, cwd=folder, env=environment, check=True)


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll for up to four minutes: a busy machine may take minutes to start a run."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "timeout after four minutes"
        time.sleep(0.5)


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the running processes that were started for this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DPO_WORKSPACE") == str(folder) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


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
def test_screenshots_of_prefect_and_mlflow(project, tmp_path):
    mlflow = project.mlflow
    for beta in ("0.1", "0.5"):
        tags = [{"key": name, "value": value} for name, value in (("dpo.role", "policy"), ("dpo.sweep", "a"))]
        body = {"experiment_id": "0", "run_name": f"beta {beta}", "tags": tags}
        made = httpx.post(f"{mlflow}/api/2.0/mlflow/runs/create", json=body).raise_for_status().json()
        body = {"run_id": made["run"]["info"]["run_id"], "key": "beta", "value": beta}
        httpx.post(f"{mlflow}/api/2.0/mlflow/runs/log-parameter", json=body).raise_for_status()
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
        "mlflow-compare": ["beta 0.1", "beta 0.5", "Parameters"],
    }
    addresses = prefect_pages(f"{project.url}/api") | mlflow_pages(mlflow)
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
    (project.folder / "pause.txt").write_text("300")
    project.pause()
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


def test_the_database_of_prefect_belongs_to_the_checkout(tmp_path):
    """Two checkouts of one user see no runs of each other."""
    shutil.copy(ROOT / "prefect.toml", tmp_path)
    code = "from prefect.settings import get_current_settings as settings; import os; database = settings().server"
    code += ".database.connection_url.get_secret_value(); print(os.path.realpath(database.partition(':///')[2]))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / ".prefect/prefect.db"), done.stderr


def test_only_orphaned_processes_of_this_folder_are_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {servers.WORKSPACE: str(tmp_path), slots.WORKERS_RUN: "1"}
    kinds = [run, run | {FLOW_RUN: "1"}, {slots.WORKERS_RUN: "1"}, {servers.WORKSPACE: str(tmp_path)}]
    started = [subprocess.Popen(["sleep", "60"], env=os.environ | variables) for variables in kinds]
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1.0)
    try:
        servers.end_orphans(SimpleNamespace(read_flow_runs=lambda **_: []))
        assert [process.poll() is None for process in started] == [False, False, True, True]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_process_that_reuses_the_id_of_a_server_is_not_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        servers.FOLDER.mkdir()
        record = {"name": "worker", "pid": stranger.pid, "command": ["sleep", "61"], "url": ""}
        (servers.FOLDER / "worker.json").write_text(json.dumps(record))
        servers.down()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_server_that_has_no_command_line_yet_is_running(monkeypatch):
    server = servers.Server("worker", os.getpid(), ["python", "-m", "prefect"], "")
    assert server.process() is None, "another command"
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [])
    assert server.process() == psutil.Process()


def test_a_used_port_is_an_error_with_a_fix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("PREFECT_PORT", str(port))
        with pytest.raises(InputError, match=f"port {port} is used by another program.*make up PREFECT_PORT=PORT"):
            servers.up()
    monkeypatch.setenv("PREFECT_PORT", "many")
    with pytest.raises(InputError, match="PREFECT_PORT=many: not a port"):
        servers.up()
    assert not list(servers.FOLDER.glob("*.json")), "no server was started"


def test_the_error_of_a_server_that_does_not_start_has_the_last_lines_of_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    servers.FOLDER.mkdir()
    server = servers.start("odd", "http://127.0.0.1:1", "no_such_module", env=dict(os.environ))
    with pytest.raises(
        InputError, match=r"odd did not start; last lines of \.servers/odd\.log:\n.*no_such_module"
    ):
        servers.await_health(server, lambda: False)


def test_a_sweep_changes_only_its_lists_and_nothing_if_they_are_invalid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (ROOT / "params.yaml").read_text()
    sweep.PARAMS.write_text(before)
    sweep.set_lists({"losses": ["sigmoid", "ipo"], "learning_rates": [1e-5]})
    lines = list(zip(before.splitlines(), sweep.PARAMS.read_text().splitlines(), strict=True))
    changed = {new.strip() for old, new in lines if old != new}
    assert {line.split(":")[0] for line in changed} == {"losses", "learning_rates"}
    (trial, other) = {trial.name for trial in sweep.load_params().trials() if trial.beta == 0.1}
    assert {trial, other} == {"sigmoid-0.1-1e-05-17", "ipo-0.1-1e-05-17"}
    sweep.set_lists({"losses": ["simpo", "nca"]})  # params.yaml does not list their settings
    assert {trial.loss.name for trial in sweep.load_params().trials()} == {"simpo", "nca"}
    assert sweep.load_params().sweep.reference_free_losses == ("simpo",)
    sweep.set_lists({"losses": ["simpo"]})
    assert {trial.loss.name for trial in sweep.load_params().trials()} == {"simpo"}
    assert "  simpo: {}\n" in sweep.PARAMS.read_text()
    changed_once = sweep.PARAMS.read_text()
    with pytest.raises(InputError, match=r"params\.yaml: sweep\.seeds"):
        sweep.set_lists({"seeds": [1, 1]})
    assert sweep.PARAMS.read_text() == changed_once


@pytest.mark.slow
def test_garbage_collection_keeps_champions(tmp_path):
    """Run the documented commands on four versions of one output, one of them uncommitted."""

    def execute(*words: str) -> None:
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)

    def left_by(option: str) -> set[str]:
        page = (ROOT / "docs/operations/storage.md").read_text()
        (block,) = [
            each for each in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if f"--workspace {option}\n" in each
        ]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        words = block.replace(option, f"{option} --force")  # no confirmation
        subprocess.run(["sh", "-c", words], cwd=tmp_path, check=True, capture_output=True, env=environment)
        return {file.read_text() for file in (tmp_path / ".dvc/cache/files").rglob("*") if file.is_file()}

    dvc = [sys.executable, "-m", "dvc"]
    execute("git", "init", "-q")
    execute(*dvc, "init", "-q")
    for version in ("champion", "superseded", "uncommitted", "now"):
        (tmp_path / "weights").write_text(version)
        execute(*dvc, "add", "weights")
        if version != "uncommitted":
            execute("git", "add", "-A")
            execute("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", version)
        if version == "champion":
            revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    registry = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    registry.create_registered_model(REGISTERED)
    registry.create_model_version(REGISTERED, str(tmp_path / "weights"), tags={COMMIT: revision})
    assert left_by("--all-commits") == {"champion", "superseded", "now"}
    assert left_by("--all-tags") == {"champion", "now"}


@pytest.mark.slow
def test_a_clone_pulls_all_results_from_s3(tmp_path, monkeypatch):
    """Run the documented commands with an S3 server."""
    for package in ("dvc_s3", "moto", "flask"):
        pytest.importorskip(package, reason=f"{package}: installed with the dev extra")
    (port,) = free_ports(1)
    store = f"http://127.0.0.1:{port}"
    page = (ROOT / "docs/operations/storage.md").read_text()
    lines = [line.partition("#")[0].split() for line in page.splitlines() if line.startswith("dvc remote ")]
    setting = [words for words in lines if "--local" not in words]
    mine = {"s3://bucket/dpo": "s3://results/dpo", "https://s3.example.org": store}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def dvc(folder: Path, *words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def git(folder: Path, *words: str) -> None:
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *author, *words], cwd=folder, check=True, capture_output=True)

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    git(here, "init", "-q")
    dvc(here, "init", "-q")
    make = "mkdir model && echo weights > model/w && echo 1 > figures.json"
    stage = {"cmd": make, "outs": ["model"], "metrics": [{"figures.json": {"cache": False}}]}
    YAML().dump({"stages": {"train": stage}}, here / "dvc.yaml")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: servers.is_healthy(store))
        httpx.put(f"{store}/results").raise_for_status()
        assert len(setting) == 2
        for _, *words in setting:
            dvc(here, *(mine.get(word, word) for word in words))
        dvc(here, "repro")
        assert "2 files pushed" in dvc(here, "push")
        git(here, "add", "-A")
        git(here, "commit", "-qm", "results")
        git(tmp_path, "clone", "-q", str(here), str(there))
        dvc(there, "pull")
        assert (there / "model/w").read_text() == "weights\n"
        assert "up to date" in dvc(there, "status")
        assert "in sync" in dvc(there, "status", "--cloud")
        assert "Running stage" not in dvc(there, "repro")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store)
        files, place = fsspec.core.url_to_fs("s3://results/dpo")
        assert len(files.find(place)) == 2, "one file and its folder listing"
    finally:
        server.terminate()
        server.wait()
