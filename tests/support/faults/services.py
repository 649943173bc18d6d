"""Faults of services: DVC's remote and cache, and the servers of MLflow and Prefect."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow

from flows.servers import is_healthy
from tests.support.faults.projects import (
    POLICY,
    POLICY_FILES,
    REFERENCE,
    WAIT,
    Projects,
    Repro,
    Stage,
    assert_same,
    dvc,
    wait_for,
)
from tests.support.mlflow_server import Server
from tests.support.models import free_ports
from tests.support.project import ENV, TRIAL


def remote_unreachable(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Run `dvc push` and `dvc pull` while the remote is unreachable, then again when it is reachable."""
    shutil.copytree(projects.done, folder, dirs_exist_ok=True)
    dvc(folder, "remote", "add", "--default", "store", "http://127.0.0.1:9")
    code, text = dvc(folder, "push")
    assert code, text
    assert re.search("ERROR.*", text), text
    assert_same(folder, projects)
    store = folder / "store"
    dvc(folder, "remote", "modify", "store", "url", str(store))
    assert dvc(folder, "push")[0] == 0
    for lost in (".dvc/cache", "models/base", REFERENCE, str(POLICY), "reference"):
        shutil.rmtree(folder / lost)
    dvc(folder, "remote", "modify", "store", "url", "http://127.0.0.1:9")
    code, text = dvc(folder, "pull")
    assert code, text
    dvc(folder, "remote", "modify", "store", "url", str(store))
    assert dvc(folder, "pull")[0] == 0
    assert_same(folder, projects)


def two_repros(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Run two `dvc repro` of one training in one checkout; one trains, the other fails or finds it up to date."""
    projects.trained(folder)
    runs = [Repro(folder, "--single-item", f"train@{TRIAL}") for _ in range(2)]
    texts = [run.process.communicate(timeout=WAIT)[0] for run in runs]
    codes = [run.process.returncode for run in runs]
    assert 0 in codes, texts
    for code, text in zip(codes, texts, strict=True):
        assert code == 0 or re.search(r"lock|busy", text), text
    assert_same(folder, projects, POLICY_FILES)


def shared_cache(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Run two checkouts with a shared DVC cache at once."""
    runs = []
    for name in ("one", "other"):
        shutil.copytree(projects.raw, folder / name)
        dvc(folder / name, "cache", "dir", "--local", str(folder / "cache"))
        runs.append(Repro(folder / name, "reference_logprobs"))
    for run, name in zip(runs, ("one", "other"), strict=True):
        run.wait()
        assert_same(folder / name, projects, ("data/*.parquet", f"{REFERENCE}/*.safetensors", "reference/*/*"))


@dataclass(frozen=True)
class TrackAt:
    """Set the address of MLflow's server."""

    url: str

    def __call__(self) -> None:
        os.environ["MLFLOW_TRACKING_URI"] = self.url


def mlflow_down(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Train while MLflow's server is down, or is killed during the training; all is uploaded later."""
    for case in ("start", "middle"):
        here = projects.trained(folder / case)
        server = Server(folder / case)
        try:
            if case == "middle":
                server.start()
            training = Stage(here, "train", before=TrackAt(server.url))
            if case == "middle":
                training.await_step(draw.randrange(2, 80))
                server.kill()
            training.wait()
            assert_same(here, projects, POLICY_FILES)
            server.start()
            env = {**ENV, "MLFLOW_TRACKING_URI": server.url}
            subprocess.run([sys.executable, "-m", "tasks.commands.cli", "sync"], cwd=here, env=env, check=True)
            client = mlflow.MlflowClient(server.url)
            runs = client.search_runs(["1"], f"tags.`dpo.trial` = '{TRIAL}'")
            assert [run.info.status for run in runs] == ["FINISHED"]
            steps = [point.step for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]
            assert sorted(steps) == list(range(1, 97))
        finally:
            server.kill()


def prefect_down(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Kill Prefect's server while a flow runs a stage; all stages complete, then an error names the server."""
    shutil.copytree(projects.raw, folder, dirs_exist_ok=True)
    port = str(*free_ports(1))
    env = {**ENV, "PREFECT_HOME": str(folder / ".prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port],
        cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    log = folder / "flow.log"
    try:
        wait_for(lambda: is_healthy(f"http://127.0.0.1:{port}/api/health"))
        with log.open("wb") as file:
            flow = subprocess.Popen(
                [sys.executable, "-m", "flows.pipeline"], cwd=folder, env=env, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: "Running stage 'sft'" in log.read_text() or flow.poll() is not None)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert flow.wait(WAIT) == 1, log.read_text()[-3000:]
    assert re.search(
        r"error: Prefect's server at \S+ cannot be reached .* it runs only what is missing", log.read_text()
    )
    run = Repro(folder)
    assert not list(run.stages()), run.lines
    run.wait()
    assert_same(folder, projects)
