"""A sweep on two machines: three clones, one remote, one Prefect server, two workers, stages that copy files."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.models import free_ports
from tests.support.project import ENV, ROOT

DVC_YAML = """
stages:
  data:
    cmd: python data.py
    deps: [data.py]
    outs: [data.txt]
  train:
    matrix: {beta: "${betas}"}
    cmd: python train.py ${item.beta}
    deps: [train.py, data.txt]
    outs: ["models/${item.beta}"]
    metrics: [{"metrics/${item.beta}.json": {cache: false}}]
  evaluate:
    matrix: {beta: "${betas}"}
    cmd: cat models/${item.beta} metrics/${item.beta}.json > judged-${item.beta}.txt
    deps: ["models/${item.beta}"]
    outs: ["judged-${item.beta}.txt"]
"""
TRAIN = """
import os, pathlib, sys, time
beta = sys.argv[1]
for folder in ("models", "metrics"):
    pathlib.Path(folder).mkdir(exist_ok=True)
flag = pathlib.Path(os.environ.get("HANG", "/nonexistent"))
if flag.exists() and pathlib.Path.cwd().name != "head":
    flag.unlink()
    pathlib.Path(f"{flag}.pid").write_text(str(os.getpid()))
    time.sleep(600)
time.sleep(1)
pathlib.Path("models", beta).write_text(pathlib.Path("data.txt").read_text() + beta)
pathlib.Path("metrics", f"{beta}.json").write_text(f'{{"beta": {beta}}}')
with open(os.environ["MACHINES"], "a") as log:
    log.write(f"{pathlib.Path.cwd().name} {beta}\\n")
"""


IMPATIENT = "import flows.distributed as d; d.LOST_SECONDS = 25; from flows.pipeline import main; main()"


def run(folder: Path, *command: str, code: int = 0, **env: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**ENV, **env}, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def git(folder: Path, *words: str) -> str:
    return run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words)


class Machines:
    """A head and two clones with workers."""

    def __init__(self, place: Path) -> None:
        self.place, self.head = place, place / "head"
        (port,) = free_ports(1)
        self.log, self.hang = place / "machines.log", place / "hang"
        self.env = {
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_HOME": str(place / "prefect"),
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
            "MACHINES": str(self.log),
            "HANG": str(self.hang),
            "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
            "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org",
        }  # fmt: skip
        self.processes = {}
        git(place, "init", "-q", "--bare", "origin")
        git(place, "clone", "-q", "origin", "head")
        for name in ("dpo", "tasks", "flows"):
            shutil.copytree(ROOT / name, self.head / name, ignore=shutil.ignore_patterns("__pycache__"))
        (self.head / "dvc.yaml").write_text(DVC_YAML)
        (self.head / "params.yaml").write_text("betas: [0.1, 0.2, 0.3, 0.4]\n")
        (self.head / "data.py").write_text("open('data.txt', 'w').write('data ')")
        (self.head / "train.py").write_text(TRAIN)
        (self.head / ".gitignore").write_text("/.prefect/\n__pycache__/\n")
        run(self.head, "dvc", "init", "-q")
        run(self.head, "dvc", "remote", "add", "--default", "store", str(place / "store"))
        git(self.head, "add", "-A")
        git(self.head, "commit", "-qm", "start")
        git(self.head, "push", "-q", "origin", "HEAD")
        self.start("server", place, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        self.await_server()
        for name in ("one", "two"):
            git(place, "clone", "-q", "origin", name)

    def start(self, name: str, folder: Path, *command: str, **env: str) -> None:
        with (self.place / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=folder, env={**ENV, **self.env, **env},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def await_server(self) -> None:
        from flows.servers import is_healthy

        deadline = time.monotonic() + 120
        while not is_healthy(f"{self.env['PREFECT_API_URL']}/health"):
            assert time.monotonic() < deadline
            time.sleep(0.3)

    def start_worker(self, name: str) -> None:
        """Start the documented command in a clone, and wait until the worker is online."""
        pool = run(self.head, sys.executable, "-m", "flows.identity", **self.env).strip() + "-trials"
        words = ["worker", "start", "--pool", pool, "--type", "process", "--limit", "1", "--name", name]
        folder = self.place / name
        self.start(name, folder, "prefect", *words, DPO_WORKSPACE=str(folder), PREFECT_WORKER_QUERY_SECONDS="1")
        deadline = time.monotonic() + 60
        while f"Worker '{name}' started" not in (self.place / f"{name}.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def sweep(self, **env: str) -> str:
        return run(self.head, sys.executable, "-m", "flows.pipeline", "--distributed", **{**self.env, **env})

    def machines(self) -> list[str]:
        return sorted(self.log.read_text().split()[::2]) if self.log.exists() else []

    def close(self) -> None:
        for process in self.processes.values():
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in family:
                each.send_signal(signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    made = Machines(tmp_path_factory.mktemp("machines"))
    try:
        yield made
    finally:
        made.close()


@pytest.mark.slow
def test_trials_run_on_all_machines_and_their_results_are_restored_here(machines):
    output = run(machines.head, sys.executable, "-m", "flows.pipeline", "--distributed", code=1, **machines.env)
    assert "no worker is online" in output
    for name in ("one", "two"):
        machines.start_worker(name)
    print(machines.sweep()[-3000:])
    assert sorted(set(machines.machines())) == ["one", "two"]
    assert len(machines.machines()) == 4
    assert (machines.head / "judged-0.3.txt").read_text() == 'data 0.3{"beta": 0.3}'
    assert "up to date" in run(machines.head, "dvc", "status")
    assert not git(machines.place / "origin", "for-each-ref", "refs/dpo")


@pytest.mark.slow
def test_a_stage_whose_machine_is_lost_runs_elsewhere(machines):
    machines.log.unlink(missing_ok=True)
    machines.hang.touch()
    (machines.head / "params.yaml").write_text("betas: [0.5, 0.6]\n")
    flow = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, "--distributed"], cwd=machines.head,
        env={**ENV, **machines.env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not Path(f"{machines.hang}.pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    stuck = psutil.Process(int(Path(f"{machines.hang}.pid").read_text()))
    lost = Path(stuck.cwd()).name
    for each in [*psutil.Process(machines.processes[lost].pid).children(recursive=True), stuck]:
        each.send_signal(signal.SIGKILL)
    os.killpg(machines.processes[lost].pid, signal.SIGKILL)
    output = flow.communicate(timeout=400)[0].decode()
    assert flow.returncode == 0, output[-4000:]
    assert (machines.head / "judged-0.5.txt").read_text() == 'data 0.5{"beta": 0.5}'
    assert lost not in machines.machines()
