"""A checkout whose stages only copy files: real git, DVC, MLflow and flows, without a model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

from tests.support.project import ENV, ROOT, change

DVC_YAML = """
stages:
  train:
    cmd: python train.py
    deps: [data/own, train.py]
    outs: [models/policy]
    metrics: [{metrics/train.json: {cache: false}}, {metrics/comparison.json: {cache: false}}]
"""
TRAIN = """
import json, os, pathlib, sys, time
rows = sorted(line for file in pathlib.Path("data/own/landed").glob("*.jsonl") for line in file.open())
if "broken" in os.environ.get("STAGE", ""):
    pathlib.Path("models").mkdir(exist_ok=True)
    pathlib.Path("metrics").mkdir(exist_ok=True)
    pathlib.Path("metrics/half.json").write_text("{}")
    sys.exit("the stage is broken")
if "waits" in os.environ.get("STAGE", ""):
    pathlib.Path("models").mkdir(exist_ok=True)
    pathlib.Path("models/started").touch()
    time.sleep(300)
pathlib.Path("models/policy").mkdir(parents=True)
pathlib.Path("models/policy/weights").write_text("".join(rows))
pathlib.Path("metrics").mkdir(exist_ok=True)
pathlib.Path("metrics/train.json").write_text(json.dumps({"rows": len(rows)}))
compared = {"selected": None, "reason": "None.", "policies": {}}
pathlib.Path("metrics/comparison.json").write_text(json.dumps(compared))
"""
FLOW = """
import os, signal, sys
import flows.git, flows.journal, flows.landing, flows.recovery, flows.retrain, flows.rollback
from flows.pipeline import run_now
point, name, landing = sys.argv[1:]

def die(module, name, after):
    real = getattr(module, name)
    def wrapper(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, wrapper)

POINTS = {
    "none": lambda: None,
    "before dvc add": lambda: die(flows.landing, "dvc", False),
    "after the commit of the data": lambda: die(flows.landing, "commit", True),
    "before the commit of the results": lambda: die(flows.retrain, "commit_results", False),
    "after the commit of the results": lambda: die(flows.retrain, "commit_results", True),
    "after the gate": lambda: die(flows.retrain, "run_gate", True),
    "in the push": lambda: die(flows.retrain, "push_results", False),
    "before the alias": lambda: die(flows.recovery, "roll_back", False),
    "after the alias": lambda: die(flows.recovery, "roll_back", True),
    "before the checkout": lambda: die(flows.journal, "check_out_data", False),
}
POINTS[point]()
if name == "retrain":
    run_now(flows.retrain.retrain, landing=landing)
else:
    run_now(flows.rollback.rollback)
"""


def write(path: Path, table: pd.DataFrame) -> None:
    table.to_json(path, orient="records", lines=True)


class Checkout:
    """A checkout with trivial stages, its landing folder, and a Prefect server for its flows."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.landing = folder / "project", folder / "landing"
        self.first: dict[str, object] = {}
        self.landing.mkdir()
        self.folder.mkdir()
        names = {f"GIT_{role}_{key}": "t@e" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        self.env = {**ENV, **names, "PREFECT_API_URL": url, "PYTHONPATH": str(self.folder)}
        for name in ("dpo", "tasks", "flows"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("params.yaml", ".gitignore", ".dvcignore", "prefect.toml"):
            shutil.copy(ROOT / name, self.folder / name)
        change(self.folder, {"data.source": ["data/own/landed"]})
        (self.folder / "dvc.yaml").write_text(DVC_YAML)
        (self.folder / "train.py").write_text(TRAIN)
        (self.folder / "flow.py").write_text(FLOW)
        self.run("git", "init", "-qb", "main")
        self.run("dvc", "init", "-q")
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "start")

    def run(self, *command: str, code: int = 0, **env: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == code, (done.stdout + done.stderr)[-4000:]
        return done.stdout + done.stderr

    def flow(self, name: str = "retrain", point: str = "none", code: int = 0, **env: str) -> str:
        return self.run(sys.executable, "flow.py", point, name, str(self.landing), code=code, **env)

    def state(self) -> dict[str, object]:
        """Return commit, status, outputs and metrics."""
        files = [path for name in ("models", "metrics", "data/own") for path in (self.folder / name).rglob("*")]
        return {
            "commit": self.run("git", "rev-parse", "HEAD"),
            "status": self.run("git", "status", "--porcelain"),
            "files": {str(path): path.read_bytes() for path in files if path.is_file()},
        }

    def landed(self) -> list[str]:
        return sorted(path.name[17:] for path in (self.folder / "data/own/landed").glob("*"))

    def refused(self) -> dict[str, str]:
        folder = self.folder / ".retrain/refused"
        return {path.name[17:]: path.read_text() for path in folder.glob("[!.]*")}

    def subjects(self) -> list[str]:
        return self.run("git", "log", "--format=%s").splitlines()
