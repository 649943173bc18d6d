"""The Prefect flow on small DVC projects: what it runs, in which order, what it shows, and how it fails."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

from flows.pipeline import StageError, pipeline, read_graph, run_stage, split_lines, visible

LOG = logging.getLogger("test")
DVC_YAML = """
stages:
  first:
    cmd: python -c "print('made'); open('first.txt', 'w').write(open('seed.txt').read())"
    deps: [seed.txt]
    outs: [first.txt]
  branch:
    matrix: {beta: [0.1, 0.5]}
    cmd: python branch.py ${item.beta}
    deps: [branch.py, first.txt]
    outs: ["${item.beta}.txt"]
  last:
    cmd: cat 0.1.txt 0.5.txt > last.txt
    deps: [0.1.txt, 0.5.txt]
    outs: [last.txt]
"""
BRANCH = "import sys, pathlib; pathlib.Path(sys.argv[1] + '.txt').write_text('done ' + sys.argv[1])"


@pytest.fixture(scope="module", autouse=True)
def server():
    with prefect_test_harness():
        yield


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "branch.py").write_text(BRANCH)
    (tmp_path / "seed.txt").write_text("1")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["dvc", "init", "-q"], check=True)
    return tmp_path


def test_the_graph_is_dvcs_own(project):
    graph = read_graph()
    assert {stage: set(needed) for stage, needed in graph.items()} == {
        "first": set(),
        "branch@0.1": {"first"},
        "branch@0.5": {"first"},
        "last": {"branch@0.1", "branch@0.5"},
    }


def test_stages_run_once_and_show_what_dvc_did(project):
    assert pipeline() == dict.fromkeys(("first", "branch@0.1", "branch@0.5", "last"), "ran")
    assert (project / "last.txt").read_text() == "done 0.1done 0.5"
    state = pipeline(return_state=True)
    assert state.result() == dict.fromkeys(("first", "branch@0.1", "branch@0.5", "last"), "up to date")
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs()
    names = {run.name: run.state.name for run in runs if run.flow_run_id == state.state_details.flow_run_id}
    assert names == dict.fromkeys(("first", "branch@0.1", "branch@0.5", "last"), "UpToDate")


def test_the_page_of_a_stage_is_an_artifact_also_when_the_stage_fails(project):
    (project / "branch.py").write_text(
        f"{BRANCH}\npathlib.Path('reports').mkdir(exist_ok=True)\n"
        "pathlib.Path('reports/branch@' + sys.argv[1] + '.md').write_text('page of ' + sys.argv[1])\n"
        "sys.exit(sys.argv[1] == '0.5')"
    )
    with pytest.raises(StageError):
        pipeline()
    with get_client(sync_client=True) as client:
        pages = {artifact.key: artifact.data for artifact in client.read_artifacts() if artifact.key}
    assert pages == {"branch-0-1": "page of 0.1", "branch-0-5": "page of 0.5"}


def test_outputs_of_a_known_run_are_restored(project):
    pipeline()
    (project / "seed.txt").write_text("2")
    assert pipeline()["first"] == "ran"
    (project / "seed.txt").write_text("1")
    assert pipeline()["first"] == "restored"
    assert (project / "first.txt").read_text() == "1"


def test_a_failed_stage_shows_its_last_lines_and_only_what_needs_it_is_not_run(project):
    (project / "branch.py").write_text(f"{BRANCH}\nif sys.argv[1] == '0.1': sys.exit('the disk is full')")
    with pytest.raises(StageError) as error:
        pipeline()
    message = str(error.value)
    assert "branch@0.1 failed" in message
    assert "the disk is full" in message
    assert "not run: last" in message
    assert (project / "0.5.txt").read_text() == "done 0.5"
    assert not (project / "last.txt").exists()
    (project / "branch.py").write_text(BRANCH)
    assert pipeline()["last"] == "ran"


def test_nothing_that_a_stage_started_outlives_it(project):
    (project / "branch.py").write_text(
        "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    run_stage("first", threading.Event(), LOG)
    stop, answers = threading.Event(), []
    runner = threading.Thread(target=lambda: answers.append(run_stage("branch@0.1", stop, LOG)))
    runner.start()
    deadline = time.monotonic() + 30
    while not ((project / "pid").exists() and (project / "pid").read_text()) and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    pid = int((project / "pid").read_text())
    stop.set()
    runner.join(10)
    assert answers == ["stopped"]
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_levels_of_the_stages_lines_are_kept(project, caplog):
    (project / "branch.py").write_text(f"{BRANCH}\nprint('WARNING: odd'); print('error: bad'); print('fine')")
    run_stage("first", threading.Event(), LOG)
    with caplog.at_level(logging.INFO):
        run_stage("branch@0.1", threading.Event(), LOG)
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["WARNING: odd"] == "WARNING"
    assert levels["error: bad"] == "ERROR"
    assert levels["fine"] == "INFO"


def test_a_progress_bar_is_one_line():
    assert visible("\x1b[32m 10%\r 50%\r100% done\x1b[0m\r") == "100% done"
    chunks = ["start\n 10%\r 5", "0%\r100%", "\nend"]
    assert list(split_lines(chunks)) == ["start", "100%", "end"]
    assert list(split_lines(["10%\r20%\r", "30%\r", "40%\n"], bar_seconds=0)) == ["20%", "30%", "40%"]
