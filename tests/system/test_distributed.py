"""A sweep on two machines: three clones, one remote, one Prefect server, two workers, stages that copy files."""

import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import flows.git
import flows.pipeline
from flows.git import through_outages
from flows.pipeline import RAN, RESTORED, UP_TO_DATE, run_stage
from flows.processes import StageError
from flows.trial import push_outputs
from tests.support.machines import Machines, copy_flows, git, run

LOGGER = logging.getLogger("test")
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
    outs: ["models/${item.beta}", {"metrics/${item.beta}.json": {cache: false}}]
  evaluate:
    matrix: {beta: "${betas}"}
    cmd: cat models/${item.beta} metrics/${item.beta}.json > judged-${item.beta}.txt
    deps: ["models/${item.beta}", "metrics/${item.beta}.json"]
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


def fill(head: Path) -> None:
    copy_flows(head)
    (head / "dvc.yaml").write_text(DVC_YAML)
    (head / "params.yaml").write_text("betas: [0.1, 0.2, 0.3, 0.4]\n")
    (head / "data.py").write_text("open('data.txt', 'w').write('data ')")
    (head / "train.py").write_text(TRAIN)
    (head / ".gitignore").write_text("/.prefect/\n__pycache__/\n")


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    place = tmp_path_factory.mktemp("machines")
    made = Machines(
        place,
        fill,
        lambda head: run(head, "dvc", "remote", "add", "--default", "store", str(place / "store")),
        MACHINES=str(place / "machines.log"),
        HANG=str(place / "hang"),
    )
    try:
        yield made
    finally:
        made.close()


def ran_on(machines: Machines) -> list[str]:
    log = machines.place / "machines.log"
    return sorted(log.read_text().split()[::2]) if log.exists() else []


@pytest.mark.slow
def test_trials_run_on_all_machines_and_their_results_are_restored_here(machines):
    output = run(machines.head, sys.executable, "-m", "flows.pipeline", "--distributed", code=1, **machines.env)
    assert "no worker is online" in output
    for name in ("one", "two"):
        machines.start_worker(name)
    output = machines.sweep()
    assert "it runs in this checkout" not in output
    assert sorted(set(ran_on(machines))) == ["one", "two"]
    assert len(ran_on(machines)) == 4
    assert (machines.head / "judged-0.3.txt").read_text() == 'data 0.3{"beta": 0.3}'
    assert "up to date" in run(machines.head, "dvc", "status")
    assert not git(machines.place / "origin", "for-each-ref", "refs/dpo")


@pytest.mark.slow
def test_trials_use_the_inputs_of_their_commit_and_not_those_of_an_earlier_one(machines):
    (machines.place / "machines.log").unlink()
    (machines.head / "data.py").write_text("open('data.txt', 'w').write('newer data ')")
    machines.sweep()
    assert set(ran_on(machines)) <= {"one", "two"}
    assert len(ran_on(machines)) == 4
    assert (machines.head / "judged-0.3.txt").read_text() == 'newer data 0.3{"beta": 0.3}'


@pytest.mark.slow
def test_missing_metrics_of_earlier_trials_are_restored(machines):
    (machines.place / "machines.log").unlink(missing_ok=True)
    shutil.rmtree(machines.head / "metrics")
    output = machines.sweep()
    assert "it runs in this checkout" not in output
    assert ran_on(machines) == []
    assert (machines.head / "metrics/0.3.json").read_text() == '{"beta": 0.3}'
    assert "up to date" in run(machines.head, "dvc", "status")


@pytest.mark.slow
def test_a_stage_whose_machine_is_lost_runs_elsewhere(machines):
    (machines.place / "machines.log").unlink(missing_ok=True)
    hang = machines.place / "hang"
    hang.touch()
    (machines.head / "params.yaml").write_text("betas: [0.5, 0.6]\n")
    flow = machines.begin_sweep()
    deadline = time.monotonic() + 200
    while not Path(f"{hang}.pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    lost = Path(psutil.Process(int(Path(f"{hang}.pid").read_text())).cwd()).name
    machines.kill_worker(lost)
    machines.finish(flow)
    assert (machines.head / "judged-0.5.txt").read_text() == 'newer data 0.5{"beta": 0.5}'
    assert lost not in ran_on(machines)


@pytest.fixture
def answers(monkeypatch) -> list[bool]:
    """Return what the remote is going to answer, True at the end; no test waits."""
    coming: list[bool] = []
    monkeypatch.setattr(flows.git, "remote_answers", lambda: coming.pop(0) if coming else True)
    monkeypatch.setattr(flows.git, "RETRY_SECONDS", 0.0)
    return coming


def failing(times: int) -> Callable[[], str]:
    """Return work that fails so often, and then returns its name."""
    left = [None] * times

    def work() -> str:
        if left:
            left.pop()
            raise StageError("push failed\nno connection")
        return "done"

    return work


def test_work_is_repeated_when_the_remote_answers_again(answers, caplog):
    answers += [False, False, False]
    with caplog.at_level(logging.WARNING):
        assert through_outages(failing(1), threading.Event(), LOGGER) == "done"
    assert answers == [], "the work is not repeated before the remote answers"
    assert "does not answer; the work is repeated when it does: no connection" in caplog.text


def test_a_failure_while_the_remote_answers_is_raised_at_once(answers):
    with pytest.raises(StageError, match="push failed"):
        through_outages(failing(1), threading.Event(), LOGGER)


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        (ConnectionRefusedError("refused"), False),
        (TimeoutError("no reply"), False),
        (PermissionError("wrong key"), True),
        (ImportError("dvc-s3 is not installed"), True),
        (ValueError("no credentials"), True),
    ],
)
def test_only_faults_of_the_connection_are_outages(fault, answer, tmp_path, monkeypatch):
    class Repo:
        tmp_dir = str(tmp_path)

        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        @property
        def cloud(self):
            raise RuntimeError("Could not connect to the endpoint URL") from fault  # as packages of storages do

    monkeypatch.setattr(flows.git, "Repo", Repo)
    assert flows.git.remote_answers() is answer


def test_an_outage_without_end_and_a_stopped_flow_raise_the_failure(answers, monkeypatch):
    answers += [False] * 10
    monkeypatch.setattr(flows.git, "OUTAGE_SECONDS", -1.0)
    with pytest.raises(StageError, match="push failed"):
        through_outages(failing(1), threading.Event(), LOGGER)
    (stopped := threading.Event()).set()
    with pytest.raises(StageError, match="push failed"):
        through_outages(failing(1), stopped, LOGGER)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_missing_metric_is_restored_or_the_stage_runs_again(recorded, tmp_path, monkeypatch):
    """DVC's own `--pull` takes the stage as up to date."""
    fill(tmp_path)
    env = {"MACHINES": str(tmp_path / "log")}
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "remote", "add", "-d", "s", "store"]):
        run(tmp_path, *command)
    run(tmp_path, "dvc", "repro", "train@0.1", **env)
    monkeypatch.chdir(tmp_path)
    if recorded:
        push_outputs("train@0.1")
        shutil.rmtree(tmp_path / ".dvc/cache")
    (tmp_path / "metrics/0.1.json").unlink()
    verdict = run_stage("train@0.1", threading.Event(), LOGGER, pull=True, env=env)
    assert verdict == (RESTORED if recorded else RAN)
    assert (tmp_path / "metrics/0.1.json").read_text() == '{"beta": 0.1}'


PULLING = "Pulling data for stage: 'train@a'"


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ([PULLING], RESTORED),
        ([PULLING, "Unable to pull data for stage: 'train@a'", "Running stage 'train@a':", "output"], RAN),
        (["Stage 'train@a' is cached - skipping run, checking out outputs"], RESTORED),
        (["Stage 'train@a' didn't change, skipping"], UP_TO_DATE),
        (["Running stage 'train@a':", PULLING], RAN),
    ],
)
def test_outputs_that_dvc_fetched_are_restored(lines, verdict, monkeypatch):
    monkeypatch.setattr(flows.pipeline, "lacks_outputs", lambda stage: False)
    monkeypatch.setattr(flows.pipeline, "execute", lambda *_, **__: (0, lines))
    assert run_stage("train@a", threading.Event(), LOGGER, pull=True) == verdict
