"""The documented commands for DVC's cache and remote."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import httpx
import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from flows import servers
from tasks.tracking.registry import COMMIT, REGISTERED
from tests.support.models import free_ports
from tests.support.operations import wait_for
from tests.support.project import ROOT


@pytest.mark.slow
def test_garbage_collection_keeps_champions(tmp_path):
    """Run the documented commands on four versions of one output, one of them uncommitted."""

    def execute(*words: str) -> None:
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)

    def left_by(option: str) -> set[str]:
        page = (ROOT / "docs/operations/storage.md").read_text()
        (block,) = [
            each for each in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if f"--workspace {option}\n" in each
        ]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        words = block.replace(option, f"{option} --force")  # no confirmation
        subprocess.run(["sh", "-c", words], cwd=tmp_path, check=True, capture_output=True, env=environment)
        return {file.read_text() for file in (tmp_path / ".dvc/cache/files").rglob("*") if file.is_file()}

    dvc = [sys.executable, "-m", "dvc"]
    execute("git", "init", "-q")
    execute(*dvc, "init", "-q")
    for version in ("champion", "superseded", "uncommitted", "now"):
        (tmp_path / "weights").write_text(version)
        execute(*dvc, "add", "weights")
        if version != "uncommitted":
            execute("git", "add", "-A")
            execute("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", version)
        if version == "champion":
            revision = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    registry = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    registry.create_registered_model(REGISTERED)
    registry.create_model_version(REGISTERED, str(tmp_path / "weights"), tags={COMMIT: revision})
    assert left_by("--all-commits") == {"champion", "superseded", "now"}
    assert left_by("--all-tags") == {"champion", "now"}


@pytest.mark.slow
def test_a_clone_pulls_all_results_from_s3(tmp_path, monkeypatch):
    """Run the documented commands with an S3 server."""
    for package in ("dvc_s3", "moto", "flask"):
        pytest.importorskip(package, reason=f"{package}: installed with the dev extra")
    (port,) = free_ports(1)
    store = f"http://127.0.0.1:{port}"
    page = (ROOT / "docs/operations/storage.md").read_text()
    lines = [line.partition("#")[0].split() for line in page.splitlines() if line.startswith("dvc remote ")]
    setting = [words for words in lines if "--local" not in words]
    mine = {"s3://bucket/dpo": "s3://results/dpo", "https://s3.example.org": store}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def dvc(folder: Path, *words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def git(folder: Path, *words: str) -> None:
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *author, *words], cwd=folder, check=True, capture_output=True)

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    git(here, "init", "-q")
    dvc(here, "init", "-q")
    make = "mkdir model && echo weights > model/w && echo 1 > figures.json"
    stage = {"cmd": make, "outs": ["model"], "metrics": [{"figures.json": {"cache": False}}]}
    YAML().dump({"stages": {"train": stage}}, here / "dvc.yaml")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: servers.is_healthy(store))
        httpx.put(f"{store}/results").raise_for_status()
        assert len(setting) == 2
        for _, *words in setting:
            dvc(here, *(mine.get(word, word) for word in words))
        dvc(here, "repro")
        assert "2 files pushed" in dvc(here, "push")
        git(here, "add", "-A")
        git(here, "commit", "-qm", "results")
        git(tmp_path, "clone", "-q", str(here), str(there))
        dvc(there, "pull")
        assert (there / "model/w").read_text() == "weights\n"
        assert "up to date" in dvc(there, "status")
        assert "in sync" in dvc(there, "status", "--cloud")
        assert "Running stage" not in dvc(there, "repro")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store)
        files, place = fsspec.core.url_to_fs("s3://results/dpo")
        assert len(files.find(place)) == 2, "one file and its folder listing"
    finally:
        server.terminate()
        server.wait()
