"""Schedules, sweeps between retrainings, and notifications, with a real Prefect server."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

import pytest
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas import filters
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import slots
from tests.support.checkout import Checkout, write
from tests.support.prefect_server import prefect_server
from tests.support.project import ROOT, book_pairs, change

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@flow
def nothing() -> None:
    """Do nothing."""


def test_of_the_missed_runs_of_a_schedule_only_the_latest_starts(server, monkeypatch):
    monkeypatch.setattr(slots, "PAGE", 3)  # the runs are read in several parts
    with SyncPrefectClient(server) as client:
        client.create_work_pool(WorkPoolCreate(name="nights", type="process"))
        deployments = []
        for name in ("a", "b"):
            schedule = DeploymentScheduleCreate(
                schedule=IntervalSchedule(interval=timedelta(seconds=5)), active=True
            )
            made = client.create_deployment(
                client.create_flow(nothing), name, work_pool_name="nights", entrypoint="x:y", schedules=[schedule]
            )
            deployments.append(made)
        by_hand = client.create_flow_run_from_deployment(deployments[0])

        def of(deployment: UUID, name: str) -> list[FlowRun]:
            own = filters.DeploymentFilter(id=filters.DeploymentFilterId(any_=[deployment]))
            state = filters.FlowRunFilterState(name=filters.FlowRunFilterStateName(any_=[name]))
            runs = filters.FlowRunFilter(state=state)
            return client.read_flow_runs(flow_run_filter=runs, deployment_filter=own)

        deadline = time.monotonic() + 240
        while min(len(of(each, "Late")) for each in deployments) < 3:  # as after nights without servers
            assert time.monotonic() < deadline
            time.sleep(0.5)
        lines = list(slots.skip_missed(client, "nights"))
        missed = {each: of(each, "Cancelled") for each in deployments}
        assert len(lines) == sum(map(len, missed.values())) >= 4
        assert all("was missed and is cancelled" in line for line in lines)
        for each in deployments:
            last = max(run.expected_start_time for run in missed[each])
            left = [run for run in of(each, "Late") + of(each, "Scheduled") if run.auto_scheduled]
            assert all(run.expected_start_time > last for run in left), "the latest run is left"
            assert left
        assert client.read_flow_run(by_hand.id).state_name != "Cancelled", "a run that a person started is kept"
        for each in deployments:
            client.delete_deployment(each)


def test_the_documented_automation_sends_events_to_a_webhook(server, tmp_path):
    received = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    site = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    page = (ROOT / "docs/operations/notifications.md").read_text()
    (declared,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    with temporary_settings({PREFECT_API_URL: server}):
        block = CustomWebhookNotificationBlock(
            name="team",
            url=f"http://127.0.0.1:{site.server_port}/hook",
            json_data={"text": "{{subject}}: {{body}}"},
        )
        identity = block.save("team", overwrite=True)
    file = tmp_path / "automation.yaml"
    file.write_text(re.sub("^   ", "", declared, flags=re.MULTILINE).replace(": ID", f": {identity}"))
    checkout = Checkout(tmp_path, server)
    checkout.run(sys.executable, "-m", "prefect", "automation", "create", "--from-file", str(file))
    time.sleep(5)  # the server loads new automations a moment later
    (checkout.landing / "broken.jsonl").write_text('{"prompt": "What?", "answer": "No pair."}\n')
    write(checkout.landing / "monday.jsonl", book_pairs(0, 8))
    checkout.flow()
    deadline = time.monotonic() + 60
    while len(received) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    site.shutdown()
    site.server_close()
    texts = sorted(each["text"] for each in received)
    assert [text.partition(":")[0] for text in texts] == ["dpo.retrain.kept", "dpo.retrain.refused"]
    assert "broken.jsonl" in texts[1]


def test_a_sweep_from_the_form_does_not_block_the_next_retraining(server, tmp_path):
    checkout = Checkout(tmp_path, server)
    sweep = "from flows.sweep import sweep; sweep(betas=[{}])"
    write(checkout.landing / "monday.jsonl", book_pairs(0, 8))
    checkout.flow()
    committed = (checkout.folder / "params.yaml").read_text()
    for beta in (0.3, 0.7):
        checkout.run(sys.executable, "-c", sweep.format(beta))
        assert f"betas: [{beta}]" in checkout.run("git", "diff", "params.yaml")
    write(checkout.landing / "tuesday.jsonl", book_pairs(10, 8))
    assert "the lists of a sweep are replaced by the committed ones" in checkout.flow()
    assert (checkout.folder / "params.yaml").read_text() == committed
    assert checkout.landed() == ["monday.jsonl", "tuesday.jsonl"]
    assert "betas: [0.7]" in checkout.run("git", "stash", "show", "-p")

    change(checkout.folder, {"sweep.seeds": [99]})
    checkout.run(sys.executable, "-c", sweep.format(0.3))
    write(checkout.landing / "wednesday.jsonl", book_pairs(20, 8))
    assert "uncommitted changes in params.yaml" in checkout.flow(code=1), "changes of a person are not replaced"
    assert "99" in checkout.run("git", "diff", "params.yaml")
