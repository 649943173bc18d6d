"""Start and stop of servers: ports, process ids, logs and databases."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

from dpo.common.errors import InputError
from flows import processes, servers, slots
from tasks.tracking.provenance import FLOW_RUN
from tests.support.project import ROOT


def test_the_database_of_prefect_belongs_to_the_checkout(tmp_path):
    """Two checkouts of one user see no runs of each other."""
    shutil.copy(ROOT / "prefect.toml", tmp_path)
    code = "from prefect.settings import get_current_settings as settings; import os; database = settings().server"
    code += ".database.connection_url.get_secret_value(); print(os.path.realpath(database.partition(':///')[2]))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / ".prefect/prefect.db"), done.stderr


@pytest.mark.parametrize(
    ("address", "is_copy"),
    [
        ("sqlite+aiosqlite:///{here}/.prefect/prefect.db", True),
        ("sqlite+aiosqlite:////elsewhere/prefect.db", False),
        ("postgresql+asyncpg://user:secret@host/prefect", False),
    ],
)
def test_only_a_database_that_was_copied_with_a_checkout_is_taken_over(address, is_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    owner, updates = {"project": "other-1", "folder": "/other"}, []
    client = SimpleNamespace(
        read_variable_by_name=lambda _: SimpleNamespace(value=owner), update_variable=updates.append
    )
    refused = pytest.raises(InputError, match="belongs to another checkout, /other")
    settings = temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: address.format(here=tmp_path)})
    with settings, nullcontext() if is_copy else refused:
        servers.claim_database(client)
    assert [update.value["folder"] for update in updates] == [str(tmp_path)] * is_copy


def test_only_orphaned_processes_of_this_folder_are_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {servers.WORKSPACE: str(tmp_path), slots.WORKERS_RUN: "1"}
    kinds = [run, run | {FLOW_RUN: "1"}, {slots.WORKERS_RUN: "1"}, {servers.WORKSPACE: str(tmp_path)}]
    started = [subprocess.Popen(["sleep", "60"], env=os.environ | variables) for variables in kinds]
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1.0)
    try:
        servers.end_orphans(SimpleNamespace(read_flow_runs=lambda **_: []))
        assert [process.poll() is None for process in started] == [False, False, True, True]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_process_that_reuses_the_id_of_a_server_is_not_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        servers.FOLDER.mkdir()
        record = {"name": "worker", "pid": stranger.pid, "command": ["sleep", "601"], "url": ""}
        (servers.FOLDER / "worker.json").write_text(json.dumps(record))
        servers.down()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_server_that_has_no_command_line_yet_is_running(monkeypatch):
    server = servers.Server("worker", os.getpid(), ["python", "-m", "prefect"], "")
    assert server.process() is None, "another command"
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [])
    assert server.process() == psutil.Process()


def test_a_used_port_is_an_error_with_a_fix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("PREFECT_PORT", str(port))
        with pytest.raises(InputError, match=f"port {port} is used by another program.*make up PREFECT_PORT=PORT"):
            servers.up()
    monkeypatch.setenv("PREFECT_PORT", "many")
    with pytest.raises(InputError, match="PREFECT_PORT=many: not a port"):
        servers.up()
    assert not list(servers.FOLDER.glob("*.json")), "no server was started"


def test_the_error_of_a_server_that_does_not_start_has_the_last_lines_of_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    servers.FOLDER.mkdir()
    server = servers.start("odd", "http://127.0.0.1:1", "no_such_module", env=dict(os.environ))
    with pytest.raises(
        InputError, match=r"odd did not start; last lines of \.servers/odd\.log:\n.*no_such_module"
    ):
        servers.await_health(server, lambda: False)
