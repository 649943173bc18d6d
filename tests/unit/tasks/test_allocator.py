"""The restart of a stage with allocator settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.common.allocator import SCORING, TRAINING, use_allocator_settings

ROOT = Path(__file__).parents[3]

PRINT_ENVIRONMENT = """
import os, sys
if "GLIBC_TUNABLES" in os.environ:
    print(os.environ["GLIBC_TUNABLES"], os.environ["THP_MEM_ALLOC_ENABLE"], *sys.orig_argv[1:])
    sys.stdout.flush()
    os._exit(0)
"""
"""Code that Python runs at its start: print environment and arguments of a restarted process, then exit."""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize(("stage", "settings"), [("train", TRAINING), ("evaluate", SCORING)])
def test_a_stage_restarts_itself_with_the_settings_and_the_same_arguments(stage, settings, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(PRINT_ENVIRONMENT)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    env.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-m", f"tasks.{stage}", "some", "arguments"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    expected = [settings["GLIBC_TUNABLES"], settings["THP_MEM_ALLOC_ENABLE"], *command[1:]]
    assert done.stdout.split() == expected


@pytest.mark.parametrize(
    ("command", "platform", "tunables", "restarts"),
    [
        (["-m", "tasks.train", "TRIAL"], "linux", None, 1),
        (["-m", "tasks.train", "TRIAL"], "linux", "", 0),
        (["-m", "tasks.train", "TRIAL"], "darwin", None, 0),
        (["-m", "tasks.compare"], "linux", None, 0),
        (["-m", "tasks.commands.cli", "train"], "linux", None, 0),
        (["-m", "pytest", "train"], "linux", None, 0),
        (["-m", "train"], "linux", None, 0),
        (["-c", "import tasks", "-m"], "linux", None, 0),
    ],
)
def test_only_stages_that_run_a_model_restart_and_only_once(command, platform, tunables, restarts, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "orig_argv", ["python", *command])
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    use_allocator_settings()
    assert len(calls) == restarts
