"""MLflow on PostgreSQL, as documented, with a server of Debian's package."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.models import free_ports
from tests.support.project import ENV, ROOT

pytestmark = pytest.mark.slow
USER, PASSWORD = "canary-user", "canary p@ss/word"
ENCODED = "canary-user:canary%20p%40ss%2Fword"


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """Start a server with a password; yield host, port and database."""
    pytest.importorskip("pg8000", reason="pg8000: installed with the extra postgresql")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder, place = programs[-1].parent, Path(tempfile.mkdtemp(prefix="postgresql-"))
    (place / "password").write_text(PASSWORD)
    user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = ["runuser", "-u", "postgres", "--"]
        for path in (place, place / "password"):
            shutil.chown(path, "postgres")
    (port,) = free_ports(1)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {place} -c fsync=off"

    def run(*command: str) -> None:
        subprocess.run([*user, *command], cwd=place, check=True, stdout=subprocess.DEVNULL)

    data = str(place / "data")
    run(str(folder / "initdb"), "-D", data, "-A", "scram-sha-256", "-U", USER, f"--pwfile={place}/password")
    run(str(folder / "pg_ctl"), "-D", data, "-o", options, "-l", str(place / "log"), "-w", "start")
    try:
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        create = [str(folder / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", USER, "mlflow"]
        subprocess.run(create, env=environment, check=True)
        yield f"127.0.0.1:{port}/mlflow"
    finally:
        run(str(folder / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(place)


USE = """
from flows import servers
from mlflow import MlflowClient
from tasks.tracking import offline, registry
import mlflow, os, sys
offline.connect()
run, client = offline.new_run("run", {}), MlflowClient()
client.log_metric(run, "eval/win_rate", 0.6)
client.log_text(run, "weights", "model/weights.txt")
model = mlflow.initialize_logged_model(name="policy", source_run_id=run)
mlflow.finalize_logged_model(model.model_id, "READY")
registry.promote(model.model_id, {"git_commit": "a" * 40})
assert registry.champion().version
servers.FOLDER.mkdir()
servers.start_mlflow(os.environ["MLFLOW_TRACKING_URI"], sys.argv[1], dict(os.environ))
print(run)
"""
STOP = "from flows import servers; assert servers.stop(servers.MLFLOW)"


def test_stages_and_server_use_the_database_and_show_no_password(database, tmp_path):
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    store = f"postgresql+pg8000://{ENCODED}@{database}"
    env = {**ENV, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "MLFLOW_TRACKING_URI": store}

    def python(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "canary" not in done.stdout + done.stderr
        return done.stdout

    run = python(USE, url).split()[-1]
    try:
        found = (
            httpx.get(f"{url}/api/2.0/mlflow/runs/get", params={"run_id": run}, timeout=60)
            .raise_for_status()
            .json()
        )
        assert found["run"]["data"]["metrics"][0]["value"] == 0.6
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        assert any("mlflow" in line for line in lines)
        servers = [line for line in lines if "canary" in line and "pg_ctl" not in line and "postgres" not in line]
        assert servers == []
    finally:
        python(STOP)
    assert (tmp_path / ".servers/mlflow.log").exists()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"canary" not in path.read_bytes(), path


def test_a_wrong_password_is_one_line_without_user_and_password(database, tmp_path):
    code = "from tasks.tracking import offline; from tasks.common.runner import run; run(offline.connect)"
    store = f"postgresql+pg8000://canary-user:canary-wrong@{database}"
    env = {**ENV, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "MLFLOW_TRACKING_URI": store}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "will be retried" not in done.stderr  # MLflow would try for two minutes
    assert "password authentication failed" in done.stderr
    assert "`mlflow experiments search`" in done.stderr
    assert "canary" not in done.stderr
