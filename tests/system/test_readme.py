"""The commands of the README, on an own model and own data, and the same project in a second clone."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.project import ENV, ROOT, TRIAL, change, execute, make_project

NOT_RUN = {
    "make test": "this test is a part of it",
    ". .venv/bin/activate": "the environment of the tests is used",
    "make mlflow": "a server; tests/system/test_operations.py starts it",
    "make up": "servers; tests/system/test_operations.py starts them",
}
MODEL, DATA = "models/own/tiny", "data/own/pairs.jsonl"
COMMIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm")


def commands(heading: str) -> list[str]:
    """Return the commands in the section of a heading of the README, without comments."""
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def run(folder: Path, command: str) -> str:
    """Run a command with the tiny project's trial and model in place of the README's; type two lines."""
    words = command.replace("sigmoid-0.1-7e-05-17", TRIAL)
    words += f" --model {MODEL}" if command.startswith("dpo init") else ""
    words = re.sub(r"^dpo ", "python -m tasks.commands.cli ", words)
    done = subprocess.run(
        ["bash", "-c", words], cwd=folder, env=ENV, capture_output=True, text=True, input="Hello\n/quit\n"
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout + done.stderr


@pytest.fixture
def project(tmp_path, tiny_model_dir):
    """A project with the Makefile, own files that only DVC tracks, and a DVC remote."""
    folder = make_project(tmp_path / "project", tiny_model_dir)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".venv").mkdir()
    (folder / ".venv/installed").touch()  # `make setup` has nothing to do
    execute(folder, "git", "rm", "-rq", "--cached", MODEL, DATA)
    execute(folder, "dvc", "add", MODEL, DATA)
    execute(folder, "dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "remote"))
    execute(folder, "git", "add", "-A")
    execute(folder, *COMMIT, "own files")
    return folder


@pytest.mark.slow
def test_the_commands_of_the_readme_run_on_own_data_and_results_are_shared(project, tmp_path):
    outputs = {command: run(project, command) for command in commands("Your own model and data")}
    assert "max_length" in outputs[f"dpo init {DATA}"]
    params = (project / "params.yaml").read_text()
    assert f"base: {MODEL}" in params
    assert f"source: {DATA}" in params
    evaluate = {"evaluate.samples": 8, "evaluate.kl_samples": 6, "evaluate.max_new_tokens": 6}
    change(project, {"dpo.pairs_per_step": 8, "sweep.betas": [0.1], "sweep.learning_rates": [1e-2], **evaluate})

    quick = [command for command in commands("Quick start") if command not in NOT_RUN]
    assert quick == ["make repro"]
    assert TRIAL in run(project, "make repro")
    assert (project / "reports/index.html").is_file()
    execute(project, "git", "add", "-A")
    execute(project, *COMMIT, "results")
    execute(project, "dvc", "push")
    clone = tmp_path / "clone"
    execute(tmp_path, "git", "clone", "-q", str(project), str(clone))
    execute(clone, "dvc", "pull")
    assert "up to date" in execute(clone, "dvc", "status")
    assert "Running stage" not in execute(clone, "dvc", "repro")
    assert (clone / "reports/index.html").read_bytes() == (project / "reports/index.html").read_bytes()

    everyday = commands("Everyday use")
    assert len(everyday) >= 9
    outputs = {command: run(project, command) for command in everyday if command not in NOT_RUN}
    assert "Running stage" not in outputs["dvc repro"]
    assert (project / "dvc_plots/index.html").is_file()
    assert "reference" in outputs["dpo chat models/sigmoid-0.1-7e-05-17"]
