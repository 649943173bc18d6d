"""Text from data on the pages of Prefect and MLflow: Chromium fetches no picture and shows no link of it."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings

from dpo.config import load_params
from flows.artifacts import failure_page, file_table, publish_stage
from flows.processes import StageError
from flows.retrain import Retrained, report
from tasks.commands import promote
from tasks.common.paths import COMPARISON, REPORT, REPORTS, SELECTION, TRAIN
from tasks.report.comparison import selection_page
from tasks.report.validation import markdown
from tasks.tracking import offline, registry, runs
from tests.support.mlflow_server import Server
from tests.support.prefect_server import prefect_server
from tests.support.project import ROOT
from tools.browser import dom

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium"),
]
PARAMS = load_params(ROOT / "params.yaml")


class Links(HTMLParser):
    """Collect the values of attributes that name an address."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset", "data") and value]


class Listener:
    """A web server that records the paths of all requests."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        paths = self.paths

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append(self.path)
                self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def hostile(self) -> str:
        """Return text that would fetch pictures or show links if it were rendered as Markdown or HTML."""
        url = self.url
        return (
            f"![x]({url}/picture) [x]({url}/link) <img src={url}/img> <script src='{url}/script'></script> "
            f"{url}/bare <{url}/auto> | `` ![x]({url}/ticks) ```` ![x]({url}/four) [0.1, 0.2]({url}/interval) "
            f"[x][y] {url}"
        )

    def lines(self) -> str:
        """Return hostile text on several lines: with a fence, a definition and a table."""
        text = self.hostile()
        table = f"| {text} |\n| --- |\n\n[y]: {self.url}/defined"
        return f"first\n\n```\n\n{text}\n\n~~~\n\n{table}\n\n# {text}\n> {text}"

    def check(self, page: str, address: str, *, shown: bool = True) -> None:
        """Assert that the page in Chromium shows the text, without links to the listener or requests to it."""
        for _ in range(15):  # on a busy machine the server rejects requests of a page
            if self.url in (html := dom(address)) or not shown:
                break
            time.sleep(2)
        assert self.url in html or not shown, f"{page}: the hostile text is not shown"
        parser = Links()
        parser.feed(html)
        assert [link for link in parser.links if self.url in link] == [], page
        assert self.paths == [], page


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.server.shutdown()
    listening.server.server_close()


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect: str, server: Server) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    with temporary_settings({PREFECT_API_URL: prefect}):
        yield tmp_path


@flow(name="hostile")
def write_pages(listener: Listener) -> None:
    """Publish every kind of page with hostile text, then fail with it."""
    text, lines = listener.hostile(), listener.lines()
    report(Retrained("refused", text, (text,), {text: text}))
    promote.report(promote.Verdict(False, text))
    create_markdown_artifact(registry.GATE.with_suffix(".md").read_text(), key="gate")
    counts = {"rows": 1, "accepted": 0, "quarantined": 1, "rules": {}, "train": {"pairs": 0, "used": 0}}
    (REPORTS / "validate.md").write_text(
        markdown(SimpleNamespace(metrics=counts, errors=[SimpleNamespace(message=lines)]), PARAMS)
    )
    publish_stage("validate", "failed", 1.0, complete=False)
    selection = SimpleNamespace(name=text, reason=lines)
    results = SimpleNamespace(
        selection=selection, policies={text: {"win_rate": 0.5, "kl": 1}}, failure_modes={text: []}
    )
    SELECTION.write_text(selection_page(results, "win_rate"))
    publish_stage("compare", "failed", 1.0, complete=False)
    pd.DataFrame({text: [text, lines]}).to_csv("table.csv", index=False)
    create_markdown_artifact(file_table(Path("table.csv")), key="table")
    get_run_logger().warning(lines)
    with failure_page("Retraining"):
        raise StageError(f"{text}\n{lines}")


def test_pages_of_prefect(here, listener, prefect):
    state = write_pages(listener, return_state=True)
    site = prefect.removesuffix("/api")
    with SyncPrefectClient(prefect) as client:
        artifacts = [artifact for artifact in client.read_artifacts() if artifact.key]
        (run,) = client.read_flow_runs()
        raw = f"![x]({listener.url}/control)"
        control = create_markdown_artifact(raw, key="control")
    assert state.is_failed()
    keys = {"".join(re.findall(r"[a-z]+$", artifact.key)) for artifact in artifacts}
    assert keys == {"retrain", "gate", "validate", "compare", "table", "failure"}
    for artifact in artifacts:
        listener.check(artifact.key, f"{site}/artifacts/artifact/{artifact.id}")
    listener.check("flow run", f"{site}/runs/flow-run/{run.id}", shown=False)
    dom(f"{site}/artifacts/artifact/{control}")
    assert listener.paths == ["/control"], "the check can fail"


def test_pages_of_mlflow(here, listener, server):
    text, lines = listener.hostile(), listener.lines()
    for path in (REPORT, COMPARISON, TRAIN, Path("reference/train/manifest.json")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    runs.log_comparison(PARAMS, {"policy": {"kl": 1.5}}, text, lines, [])
    client = mlflow.MlflowClient(server.url)
    (sweep,) = offline.search(client, "tags.`dpo.role` = 'sweep'")
    client.set_tag(sweep.info.run_id, registry.REASON, text)
    client.log_param(sweep.info.run_id, "data.source", text)
    run = f"{server.url}/#/experiments/{sweep.info.experiment_id}/runs/{sweep.info.run_id}"
    listener.check("run", run)
    listener.check("runs", f"{server.url}/#/experiments/{sweep.info.experiment_id}/runs", shown=False)
    client.set_tag(sweep.info.run_id, "mlflow.note.content", f"![x]({listener.url}/control)")
    dom(run)
    assert "/control" in listener.paths, "the check can fail"
