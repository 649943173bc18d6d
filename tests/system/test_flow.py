"""The pipeline flow on small DVC projects: order of the stages, states, artifacts, failures and interruption."""

import io
import json
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
from flows.pipeline import pipeline, read_graph, run_stage
from flows.processes import StageError, split_lines, visible
from flows.servers import is_healthy
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
    with prefect_test_harness(server_startup_timeout=300):
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


def test_the_graph_is_read_from_dvc(project):
    graph, changed = read_graph()
    assert changed == set(graph)
    assert {stage: set(needed) for stage, needed in graph.items()} == {
        "first": set(),
        "branch@0.1": {"first"},
        "branch@0.5": {"first"},
        "last": {"branch@0.1", "branch@0.5"},
    }


def test_the_graph_is_read_when_another_dvc_command_has_ended(project, monkeypatch):
    other = {"pid": os.getpid(), "cmd": "dvc repro first"}
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(json.dumps({"write": {str(project / "first.txt"): other}, "read": {}}))
    warnings = []

    def end_the_other(seconds):
        assert len(warnings) == 1
        lock.unlink()

    monkeypatch.setattr("flows.pipeline.log.warning", lambda text, *words: warnings.append(text % words))
    monkeypatch.setattr("flows.pipeline.time.sleep", end_the_other)
    assert read_graph()[1] == {"first", "branch@0.1", "branch@0.5", "last"}
    assert "waiting for another DVC command" in warnings[0]
    assert "dvc repro first" in warnings[0]


@pytest.mark.parametrize("content", ["", '{"write": {"fir'])
def test_the_graph_is_read_after_a_kill_of_dvc_while_it_wrote_its_lock(project, content, caplog):
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(content)
    assert read_graph()[1] == {"first", "branch@0.1", "branch@0.5", "last"}
    assert "a DVC command was killed while it wrote the file" in caplog.text


def test_stages_run_once_and_their_states_say_what_dvc_did(project):
    assert pipeline() == dict.fromkeys(("first", "branch@0.1", "branch@0.5", "last"), "ran")
    assert (project / "last.txt").read_text() == "done 0.1done 0.5"
    state = pipeline(return_state=True)
    assert state.result() == dict.fromkeys(("first", "branch@0.1", "branch@0.5", "last"), "up to date")
    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    expected = dict.fromkeys(("first", "branch@0.1", "branch@0.5", "last"), "UpToDate")
    deadline, names = time.monotonic() + 60, {}
    while names != expected and time.monotonic() < deadline:  # the server stores states from a queue of events
        with get_client(sync_client=True) as client:
            names = {run.name: run.state.name for run in client.read_task_runs(flow_run_filter=this_run)}
        time.sleep(0.1)
    assert names == expected


def test_only_a_changed_stage_and_the_stages_that_it_changes_start_a_process(project, monkeypatch):
    pipeline()
    started = []

    def record(stage, *args, **kwargs):
        started.append(stage)
        return run_stage(stage, *args, **kwargs)

    monkeypatch.setattr("flows.pipeline.run_stage", record)
    assert set(pipeline().values()) == {"up to date"}
    assert not started
    (project / "branch.py").write_text(BRANCH + "  # edited")
    assert read_graph()[1] == {"branch@0.1", "branch@0.5"}
    assert pipeline() == {"first": "up to date", "branch@0.1": "ran", "branch@0.5": "ran", "last": "up to date"}
    assert sorted(started) == ["branch@0.1", "branch@0.5", "last"]
    (project / "last.txt").unlink()
    assert pipeline()["last"] == "restored"
    assert (project / "last.txt").read_text() == "done 0.1done 0.5"


FIT = """
import json, os, pathlib, sys
state = {"title": "tokens", "done": 12, "total": 40, "elapsed_s": 31.0, "remaining_s": 72.4}
pathlib.Path(os.environ["DPO_PROGRESS_FILE"]).write_text(json.dumps(state))
for folder in ("model", "reports"):
    pathlib.Path(folder).mkdir(exist_ok=True)
pathlib.Path("model/provenance.json").write_text(json.dumps({"mlflow_run": "4f0c"}))
pathlib.Path("fit.json").write_text(json.dumps({"gain": {"mean": 1 / 3, "mean_ci": [0.25, 0.5]}, "of": "a|b"}))
pathlib.Path("fit.csv").write_text("\\n".join(["step,loss", *(f"{n},{1 / n}" for n in range(1, 41))]))
pathlib.Path("reports/fit.md").write_text("Two rows are odd.\\n")
sys.exit(pathlib.Path("seed.txt").read_text() == "bad")
"""


def test_a_stage_shows_its_outputs_as_listed_by_dvc(project):
    (project / "fit.py").write_text(FIT)
    (project / "dvc.yaml").write_text(
        "stages: {fit: {cmd: python fit.py, deps: [fit.py, seed.txt], outs: [model], "
        "metrics: [{fit.json: {cache: false}}], plots: [{fit.csv: {cache: false, x: step, y: loss}}]}}"
    )
    page, progress = artifacts_of(pipeline(return_state=True))
    heading, *blocks = page.data.split("\n\n")
    assert re.fullmatch(r"## `fit`: ran in \d+ s", heading)
    assert blocks[:2] == ["MLflow: run `4f0c`", "Two rows are odd."]
    assert "| gain.mean | 0.3333 |\n| gain.mean_ci | [0.25, 0.5] |\n| of | `a\\|b` |" in page.data
    picture, table = page.data.partition("### fit.csv\n\n")[2].split("\n\n")
    assert panels(picture) == 1, "the loss by step"
    steps = [line.split()[1] for line in table.splitlines()[2:]]
    assert (steps[0], steps[-1], len(steps)) == ("1", "40", 10)
    assert progress.key == artifacts.artifact_key("fit-progress")
    assert (progress.type, progress.data) == ("progress", 100.0)
    assert artifacts_of(pipeline(return_state=True)) == [], "stages that are up to date have no artifact"

    (project / "seed.txt").write_text("bad")
    failure, page, progress = artifacts_of(pipeline(return_state=True))
    assert failure.data.startswith("## Pipeline failed\n\n**What failed:** 1 of 1 stages failed:\n\n**Why:**")
    assert "ERROR: failed to reproduce 'fit': exited with 1\n" in failure.data
    assert "\n\n**What to do:** The lines above have the reason." in failure.data
    assert page.data == "## `fit`: failed\n\nTwo rows are odd."
    assert (progress.data, progress.description) == (30.0, "failed")


def panels(picture: str) -> float:
    """Width of a Markdown image in panels."""
    found = re.fullmatch(r"!\[.+\]\(data:image/webp;base64,(.+)\)", picture)
    image = Image.open(io.BytesIO(b64decode(found[1])))
    assert len(image.convert("RGB").getcolors(2**24)) > 2, "the image is not empty"
    return image.width / 270


def test_a_plot_has_one_panel_per_numeric_column_and_is_deterministic(tmp_path):
    path = tmp_path / "curve.csv"
    table = pd.DataFrame({"step": range(300), "loss": range(300, 0, -1), "policy": "a", "margin": range(300)})
    table.to_csv(path, index=False)
    (by_step,) = artifacts.plot_images(path, {"x": "step", "y": "loss"})
    assert panels(by_step) == 2
    assert artifacts.plot_images(path, {"x": "step", "y": "loss"}) == [by_step]
    assert len(by_step) < 40_000
    (by_row,) = artifacts.plot_images(path, True)
    assert panels(by_row) == 3
    (points,) = artifacts.plot_images(path, {"template": "scatter", "x": "margin", "y": "loss"})
    assert panels(points) == 1
    table.assign(margin=0, loss=0).to_csv(path, index=False)
    assert artifacts.plot_images(path, {"x": "step"}) != [by_step]


@pytest.mark.parametrize("text", ["", "a,b\n", "a,b\nx,y\n", "a\n1,2\n3\n", '"'])
def test_a_file_without_numbers_has_no_plot(tmp_path, text):
    (tmp_path / "odd.csv").write_text(text)
    assert artifacts.plot_images(tmp_path / "odd.csv", {"x": "a"}) == []


@pytest.fixture
def progress(tmp_path):
    return artifacts.ProgressArtifact("train@a", tmp_path / "progress.json")


def write_state(
    progress, title: str, done: int, total: int | None, elapsed: float, remaining: float | None
) -> None:
    names = ("title", "done", "total", "elapsed_s", "remaining_s")
    progress.file.write_text(json.dumps(dict(zip(names, (title, done, total, elapsed, remaining), strict=True))))


def test_progress_of_a_long_stage_is_shown_with_the_remaining_time(monkeypatch, progress):
    calls, now = [], [100.0]
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda *values: calls.append(values) or 1)
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda *values: calls.append(values))
    monkeypatch.setattr(artifacts.time, "monotonic", lambda: now[0])
    progress.update()
    for state in (("tokens", 9, 10, 9.9, 1.0), ("", 1, 100, 60.0, None), ("rows", 2, 100, 61.0, None)):
        write_state(progress, *state)
        progress.update()
    assert calls == [(1.0, artifacts.artifact_key("train-a-progress"), "1 of 100")], (
        "created after 10 s, updated every 10 s"
    )
    now[0] += 10
    write_state(progress, "KL to the reference", 1200, 2400, 3609.0, 3723.2)
    progress.update()
    write_state(progress, "rows", 7, None, 1.0, None)
    progress.end("ran", complete=True)
    assert calls[1:] == [
        (1, 50.0, "KL to the reference: 1,200 of 2,400, 1:02:03 left"),
        (1, 0.0, "rows: 7"),
        (1, 100.0, "ran"),
    ]


def test_a_short_stage_has_no_progress_artifact(monkeypatch, progress):
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda *values: pytest.fail("created"))
    progress.end("ran", complete=True)
    write_state(progress, "tokens", 9, 10, 9.0, 1.0)
    progress.end("ran", complete=True)


def test_an_unreachable_server_does_not_stop_a_stage(monkeypatch, progress):
    monkeypatch.setattr(artifacts, "create_progress_artifact", lambda *values: httpx.get("http://127.0.0.1:1"))
    write_state(progress, "", 12, 40, 31.0, 72.0)
    progress.update()
    progress.end("ran", complete=True)


@pytest.mark.slow
def test_all_stages_run_if_the_server_is_lost_and_the_error_names_it(project):
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
        while not is_healthy(f"{url}/health"):
            assert server.poll() is None
            time.sleep(0.5)
        run = subprocess.Popen([sys.executable, "-m", "flows.pipeline"], **start)
        while not (project / "0.1.txt").exists():
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.1)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert (project / "last.txt").read_text() == "done 0.1done 0.5"
    assert "Completed: first, branch@0.1, branch@0.5, last" in output
    (error,) = re.findall("^error: .*", output, re.MULTILINE)
    assert error.startswith(f"error: Prefect's server at {url} cannot be reached")
    assert set(pipeline().values()) == {"up to date"}


def artifacts_of(state) -> list:
    """Artifacts of a flow run, sorted by key."""
    run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        found = [artifact for artifact in client.read_artifacts(flow_run_filter=run) if artifact.key]
    return sorted(found, key=lambda artifact: artifact.key)


@pytest.mark.slow
def test_outputs_of_an_earlier_run_are_restored(project):
    pipeline()
    (project / "seed.txt").write_text("2")
    assert pipeline()["first"] == "ran"
    (project / "seed.txt").write_text("1")
    assert pipeline()["first"] == "restored"
    assert (project / "first.txt").read_text() == "1"


def test_a_failed_stage_shows_its_last_lines_and_only_stages_that_need_it_do_not_run(project):
    (project / "branch.py").write_text(f"{BRANCH}\nif sys.argv[1] == '0.1': sys.exit('the disk is full')")
    with pytest.raises(StageError) as error:
        pipeline()
    message = str(error.value)
    assert message.startswith("1 of 4 stages failed:\n")
    assert "branch@0.1 failed" in message
    assert "the disk is full" in message
    assert "not run: last" in message
    assert (project / "0.5.txt").read_text() == "done 0.5"
    assert not (project / "last.txt").exists()
    (project / "branch.py").write_text(BRANCH)
    assert pipeline()["last"] == "ran"


def test_a_stopped_stage_leaves_no_process(project):
    (project / "branch.py").write_text(
        "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    run_stage("first", threading.Event(), LOG)
    stop, verdicts = threading.Event(), []
    runner = threading.Thread(target=lambda: verdicts.append(run_stage("branch@0.1", stop, LOG)))
    runner.start()
    deadline = time.monotonic() + 30
    while not ((project / "pid").exists() and (project / "pid").read_text()) and time.monotonic() < deadline:
        threading.Event().wait(0.1)
    pid = int((project / "pid").read_text())
    stop.set()
    runner.join(10)
    assert verdicts == ["stopped"]
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_stopped_stage_has_limited_time_to_save_its_work(project, monkeypatch, stubborn):
    monkeypatch.setattr("flows.processes.STOP_SECONDS", 3.0 if stubborn else 60.0)
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


def test_output_lines_keep_their_log_level(project, caplog):
    (project / "branch.py").write_text(f"{BRANCH}\nprint('WARNING: odd'); print('error: bad'); print('fine')")
    run_stage("first", threading.Event(), LOG)
    with caplog.at_level(logging.INFO):
        run_stage("branch@0.1", threading.Event(), LOG)
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["WARNING: odd"] == "WARNING"
    assert levels["error: bad"] == "ERROR"
    assert levels["fine"] == "INFO"


def test_a_progress_bar_is_logged_as_its_last_state():
    assert visible("\x1b[32m 10%\r 50%\r100% done\x1b[0m\r") == "100% done"
    chunks = ["start\n 10%\r 5", "0%\r100%", "\nend"]
    assert list(split_lines(chunks)) == ["start", "100%", "end"]
    assert list(split_lines(["10%\r20%\r", "30%\r", "40%\n"], bar_seconds=0)) == ["20%", "30%", "40%"]
