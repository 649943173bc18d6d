"""The Prefect flow on small DVC projects: what it runs, in which order, what it shows, and how it fails."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from base64 import b64decode
from pathlib import Path

import httpx
import pandas as pd
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.testing.utilities import prefect_test_harness

from flows import artifacts
from flows.pipeline import StageError, pipeline, read_graph, run_stage, split_lines, visible
from flows.servers import answers
from tests.support.models import free_ports

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


FIT = """
import json, pathlib, sys
for bar in ("tokens: 100%|####| 40/40 [00:00<00:00, 99it/s]", " 30%|#   | 12/40 [00:31<01:12, 2.59s/it]"):
    print(bar)
for folder in ("model", "reports"):
    pathlib.Path(folder).mkdir(exist_ok=True)
pathlib.Path("model/provenance.json").write_text(json.dumps({"mlflow_run": "4f0c"}))
pathlib.Path("fit.json").write_text(json.dumps({"gain": {"mean": 1 / 3, "mean_ci": [0.25, 0.5]}, "of": "a|b"}))
pathlib.Path("fit.csv").write_text("\\n".join(["step,loss", *(f"{n},{1 / n}" for n in range(1, 41))]))
pathlib.Path("reports/fit.md").write_text("Two rows are odd.\\n")
sys.exit(pathlib.Path("seed.txt").read_text() == "bad")
"""


def test_each_stage_shows_what_it_left_by_dvcs_own_account(project):
    (project / "fit.py").write_text(FIT)
    (project / "dvc.yaml").write_text(
        "stages: {fit: {cmd: python fit.py, deps: [fit.py, seed.txt], outs: [model], "
        "metrics: [{fit.json: {cache: false}}], plots: [{fit.csv: {cache: false, x: step, y: loss}}]}}"
    )
    page, progress = artifacts_of(pipeline(return_state=True))
    heading, *blocks = page.data.split("\n\n")
    assert re.fullmatch(r"## `fit`: ran in \d+ s", heading)
    assert blocks[:2] == ["MLflow: run `4f0c`", "Two rows are odd."]
    assert "| gain.mean | 0.3333 |\n| gain.mean_ci | [0.25, 0.5] |\n| of | a\\|b |" in page.data
    picture, table = page.data.partition("### fit.csv\n\n")[2].split("\n\n")
    assert panels(picture) == 1, "the loss by step"
    steps = [line.split()[1] for line in table.splitlines()[2:]]
    assert (steps[0], steps[-1], len(steps)) == ("1", "40", 10)
    assert (progress.key, progress.type, progress.data) == ("fit-progress", "progress", 100.0)
    assert artifacts_of(pipeline(return_state=True)) == [], "up to date: nothing to show"

    (project / "seed.txt").write_text("bad")
    page, progress = artifacts_of(pipeline(return_state=True))
    assert page.data == "## `fit`: failed\n\nTwo rows are odd."
    assert (progress.data, progress.description) == (30.0, "failed")


def panels(picture: str) -> float:
    """How many panels of the usual width a picture in Markdown is wide."""
    found = re.fullmatch(r"!\[.+\]\(data:image/webp;base64,(.+)\)", picture)
    image = Image.open(io.BytesIO(b64decode(found[1])))
    assert len(image.convert("RGB").getcolors(2**24)) > 2, "something is drawn"
    return image.width / 270


def test_a_picture_has_a_panel_for_each_figure_of_a_table_and_is_always_the_same(tmp_path):
    path = tmp_path / "curve.csv"
    table = pd.DataFrame({"step": range(300), "loss": range(300, 0, -1), "policy": "a", "margin": range(300)})
    table.to_csv(path, index=False)
    (by_step,) = artifacts.plotted(path, {"x": "step", "y": "loss"})
    assert panels(by_step) == 2
    assert artifacts.plotted(path, {"x": "step", "y": "loss"}) == [by_step]
    assert len(by_step) < 40_000
    (by_row,) = artifacts.plotted(path, True)
    assert panels(by_row) == 3
    (points,) = artifacts.plotted(path, {"template": "scatter", "x": "margin", "y": "loss"})
    assert panels(points) == 1
    table.assign(margin=0, loss=0).to_csv(path, index=False)
    assert artifacts.plotted(path, {"x": "step"}) != [by_step]


@pytest.mark.parametrize("text", ["", "a,b\n", "a,b\nx,y\n", "a\n1,2\n3\n", '"'])
def test_what_cannot_be_drawn_is_no_picture(tmp_path, text):
    (tmp_path / "odd.csv").write_text(text)
    assert artifacts.plotted(tmp_path / "odd.csv", {"x": "a"}) == []


def test_a_bar_is_shown_with_the_time_left_once_it_is_a_long_one(monkeypatch):
    shown = []
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda *seen: shown.append(seen) or 1)
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda *seen: shown.append(seen))
    progress = artifacts.Progress("train@a")
    for line in ("Running", "tokens: 90%|# | 9/10 [00:09<00:01, 1it/s]", "  1%|  | 1/99 [01:00<?, ?it/s]"):
        progress.show(line)
    progress.show("KL to the reference:  50%|#    | 1.2k/2.4k [1:00:09<1:02:03, 2.59s/row, loss=1]")
    progress.end("ran", complete=True)
    assert shown == [
        (1.0, "train-a-progress", "1/99, ? left"),
        (1, 50.0, "KL to the reference: 1.2k/2.4k, 1:02:03 left"),
        (1, 100.0, "ran"),
    ]


def test_a_server_that_is_away_stops_no_stage(monkeypatch):
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda *seen: httpx.get("http://127.0.0.1:1"))
    progress = artifacts.Progress("train")
    progress.show(" 30%|#   | 12/40 [00:31<01:12, 2.59s/it]")
    progress.end("ran", complete=True)


def test_a_server_that_goes_away_in_the_middle_costs_no_stage_and_is_named_in_the_end(project):
    for package in ("dpo", "tasks", "flows"):
        (project / package).symlink_to(Path(__file__).parents[2] / package)
    (project / "branch.py").write_text(f"{BRANCH}; import time; time.sleep(1)")
    port = str(*free_ports(1))
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {"PREFECT_HOME": str(project / "home"), "PREFECT_API_URL": url}
    environment |= {"PREFECT_CLIENT_MAX_RETRIES": "1"}
    start = {
        "cwd": project,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    words = [sys.executable, "-m", "prefect", "server", "start", "--port", port]
    server = subprocess.Popen(words, **start, start_new_session=True)
    try:
        while not answers(f"{url}/health"):
            assert server.poll() is None
            time.sleep(0.5)
        run = subprocess.Popen([sys.executable, "-m", "flows.pipeline"], **start)
        while not (project / "0.1.txt").exists():
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.1)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert (project / "last.txt").read_text() == "done 0.1done 0.5"
    assert "Completed: first, branch@0.1, branch@0.5, last" in told
    assert re.findall("^error: .*", told, re.MULTILINE)[0].startswith(f"error: Prefect's server at {url} is gone")
    assert set(pipeline().values()) == {"up to date"}


def artifacts_of(state) -> list:
    """What a flow run shows, by key."""
    run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        found = [artifact for artifact in client.read_artifacts(flow_run_filter=run) if artifact.key]
    return sorted(found, key=lambda artifact: artifact.key)


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


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_stage_that_is_stopped_may_keep_what_it_has_done_but_not_for_long(project, monkeypatch, stubborn):
    monkeypatch.setattr("flows.pipeline.STOP_SECONDS", 3.0 if stubborn else 60.0)
    (project / "branch.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def keep(*_):\n"
        "    time.sleep(0.5); pathlib.Path('kept').write_text('all')\n"
        f"    {'pass' if stubborn else 'sys.exit(1)'}\n"
        "signal.signal(signal.SIGTERM, keep); pathlib.Path('runs').touch(); time.sleep(300)"
    )
    run_stage("first", threading.Event(), LOG)
    stop = threading.Event()
    runner = threading.Thread(target=run_stage, args=("branch@0.1", stop, LOG))
    runner.start()
    while not (project / "runs").exists():
        time.sleep(0.1)
    stop.set()
    runner.join(55)
    assert not runner.is_alive()
    assert (project / "kept").read_text() == "all"


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
