"""A checkout with trivial stages, its servers and its worker."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from ruamel.yaml import YAML

from tests.support.models import free_ports
from tests.support.project import ROOT, change

DVC_YAML = """
stages:
  validate:
    cmd: mkdir -p reports && echo '## Ten pairs are valid' > reports/validate.md && echo ten > valid.txt
    outs: [valid.txt]
  train:
    matrix: {beta: [0.1, 0.5]}
    cmd: cat valid.txt > ${item.beta}.txt && cat pause.txt && sleep $(cat pause.txt)
    deps: [valid.txt, pause.txt]
    outs: ["${item.beta}.txt"]
  compare:
    cmd: mkdir -p metrics && cat 0.1.txt 0.5.txt > compared.txt && cp comparison.json metrics
    deps: [0.1.txt, 0.5.txt]
    outs: [compared.txt]
    metrics: [{metrics/comparison.json: {cache: false}}]
"""
COMPARISON = {"selected": None, "reason": "No policy shows more than its reference.", "policies": {}}
FIVE_LINES = re.search(
    r"## Nightly retraining\n\n```sh\n(.*?)```", (ROOT / "docs/operations/retraining.md").read_text(), re.DOTALL
)


class Project:
    """A checkout with trivial stages, set up and started by the five lines of the README."""

    def __init__(self, place: Path, model: Path) -> None:
        self.folder = place / "dpo-pipeline"
        self.ports = free_ports(2)
        self.url = f"http://127.0.0.1:{self.ports[0]}"
        self.mlflow = f"http://127.0.0.1:{self.ports[1]}"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(place / "prefect"),
            "PREFECT_PORT": str(self.ports[0]),
            "MLFLOW_PORT": str(self.ports[1]),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_WORKER_PREFETCH_SECONDS": "2",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": "3",
            "HF_HUB_OFFLINE": "1",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": f"url.{place}/origin/.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://git.example.org/team/",
            "GIT_CONFIG_KEY_1": "core.hooksPath",
            "GIT_CONFIG_VALUE_1": str(place / "hooks"),
        }
        for role in ("AUTHOR", "COMMITTER"):
            self.environment |= {f"GIT_{role}_NAME": "t", f"GIT_{role}_EMAIL": "t@example.org"}
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            self.environment.pop(name, None)
        (place / "hooks").mkdir()
        installed = place / "hooks/post-checkout"  # marks `make setup` as done, so that this environment is used
        installed.write_text("#!/bin/sh\nmkdir -p .venv && touch -d '1 hour' .venv/installed\n")
        installed.chmod(0o755)
        make_origin(place / "origin/dpo-pipeline.git", model, self.environment)
        pairs = [{"prompt": f"Of {n}?", "chosen": f"{n} is a joy.", "rejected": f"{n} bores.", "split": "train"}
                 for n in range(4)]  # fmt: skip
        (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        lines = FIVE_LINES[1].replace("/path/to/pairs.jsonl", str(place / "pairs.jsonl"))
        subprocess.run(["bash", "-ec", lines], cwd=place, env=self.environment, check=True)

    def execute(self, *command: str, **more: str) -> str:
        environment = self.environment | more
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    def servers(self, action: str) -> str:
        return self.execute(sys.executable, "-m", "flows.servers", action)

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """Send a request to Prefect's API and return the response; retry 503, which means a busy database."""
        for _ in range(20):
            answer = httpx.request(method, f"{self.url}/api/{path}", json=body or None, timeout=10)
            if answer.status_code != 503:
                break
            time.sleep(0.5)
        return answer.raise_for_status().json() if answer.content else None

    def deployment(self, name: str) -> Any:
        """Return a deployment by the name of its flow."""
        return self.ask("GET", f"deployments/name/{name}/{self.name}")

    @property
    def name(self) -> str:
        return str(json.loads((self.folder / ".prefect/project.json").read_text())["name"])

    def runs(self, name: str) -> Any:
        """Return the flow runs of a deployment, oldest first."""
        only = {"id": {"any_": [self.deployment(name)["id"]]}}
        return self.ask("POST", "flow_runs/filter", deployments=only, sort="START_TIME_ASC")

    def await_run(self, identity: str, state: str) -> Any:
        wait_for(lambda: self.ask("GET", f"flow_runs/{identity}")["state_name"] == state)
        return self.ask("GET", f"flow_runs/{identity}")

    def pause(self) -> None:
        """Pause the deployments that have schedules."""
        for name in ("pipeline", "retrain"):
            self.ask("PATCH", f"deployments/{self.deployment(name)['id']}", paused=True)

    def submit(self, name: str, **parameters: object) -> str:
        identity = self.deployment(name)["id"]
        return self.ask("POST", f"deployments/{identity}/create_flow_run", parameters=parameters)["id"]


def make_origin(folder: Path, model: Path, environment: dict[str, str]) -> None:
    """Make the repository to clone: a tiny model, trivial stages, the pipeline scheduled every minute."""
    folder.mkdir(parents=True)
    for name in ("dpo", "tasks", "flows", "functions"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "prefect.toml", "params.yaml", ".gitignore", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(model, folder / "models/own/tiny")
    change(folder, {"model.base": "models/own/tiny", "engine.max_length": 128})
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "pause.txt").write_text("0")
    (folder / "comparison.json").write_text(json.dumps(COMPARISON))
    with (folder / ".gitignore").open("a") as ignored:
        ignored.write("/valid.txt\n/0.?.txt\n/compared.txt\n")
    yaml = YAML()
    declared = yaml.load(folder / "prefect.yaml")
    declared["deployments"][0]["schedules"] = [{"cron": "* * * * *", "timezone": "UTC"}]
    yaml.dump(declared, folder / "prefect.yaml")
    add, commit = ["git", "add", "-A"], ["git", "commit", "-qm", "1"]
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], add, commit):
        subprocess.run(command, cwd=folder, env=environment, check=True)


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll for up to four minutes: a busy machine may take minutes to start a run."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "timeout after four minutes"
        time.sleep(0.5)


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the running processes that were started for this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DPO_WORKSPACE") == str(folder) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found
