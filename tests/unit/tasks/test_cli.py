"""The console script `dpo`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tasks.commands import plan
from tasks.commands.cli import app

ROOT = Path(__file__).parents[3]
COMMANDS = [
    "validate", "init", "plan", "chat", "sample", "lineage", "merge", "promote", "publish", "tune", "results",
    "sync",
]  # fmt: skip


def dpo(*words, cwd):
    command = [sys.executable, "-m", "tasks.commands.cli", *words]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_help_imports_no_slow_library():
    code = (
        "import sys\n"
        "from tasks.commands.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('imported:', *{'torch', 'transformers', 'mlflow', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported:"
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)


def test_there_are_no_other_commands_and_no_options_for_completion():
    assert list(get_command(app).commands) == COMMANDS
    assert [name for parameter in get_command(app).params for name in parameter.opts] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_every_argument_has_a_help_text(command):
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert get_command(app).commands[command].help.count("\n") == 0
    assert all(parameter.help for parameter in get_command(app).commands[command].params)


def test_the_help_of_plan_shows_the_default_speed():
    shown = " ".join(CliRunner().invoke(app, ["plan", "--help"]).output.split())
    assert " ".join(f"{value:.0f}" for value in plan.TFLOPS) in shown
    assert f"{plan.UTILISATION}" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["results"], "error: metrics/comparison.json: no such file; run `make repro` first\n"),
        (["validate", "absent.jsonl"], "error: params.yaml: "),
        (["merge", "absent", "new"], "error: absent: no adapter_config.json; "),
    ],
)
def test_an_input_error_is_one_line_with_exit_code_2(words, message, tmp_path):
    done = dpo(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_unknown_commands_and_values_are_refused_with_exit_code_2(tmp_path):
    assert "No such command 'absent'" in dpo("absent", cwd=tmp_path).stderr
    wrong = dpo("chat", "model", "--temperature", "0", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Invalid value for '--temperature': must be above 0" in wrong.stderr


def test_results_end_with_commands_that_serve_the_selected_policy(tmp_path):
    Path(tmp_path / "metrics").mkdir()
    comparison = {
        "policies": {"a": {"reward_accuracy": 0.5, "reward_accuracy_ci": [0, 1]}},
        "selected": "a",
        "reason": "It wins.",
    }
    (tmp_path / "metrics/comparison.json").write_text(json.dumps(comparison))
    assert "serve" not in dpo("results", cwd=tmp_path).stdout
    Path(tmp_path / "models/a").mkdir(parents=True)
    (tmp_path / "models/a/provenance.json").write_text(json.dumps({"mlflow_run": "0123"}))
    Path(tmp_path / "reports").mkdir()
    link = "http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=a&compareRunsMode=CHART"
    (tmp_path / "reports/compare.md").write_text(f"**Selected:** a\n\n[Reward against KL in MLflow]({link})\n")
    shown = dpo("results", cwd=tmp_path).stdout.splitlines()
    assert f"reward against KL in MLflow: {link}" in shown
    assert "vllm serve models/a" in shown
    assert "mlflow models serve --model-uri runs:/0123/policy --env-manager local" in shown


@pytest.mark.parametrize("command", [["results"], ["--help"], ["init", "--help"]])
def test_a_closed_pipe_ends_a_command_without_a_traceback(command, tmp_path):
    Path(tmp_path / "metrics").mkdir()
    policy = {"reward_accuracy": 0.5, "reward_accuracy_ci": [0.4, 0.6]}
    comparison = {"policies": {f"policy-{n}": policy for n in range(3000)}, "reason": "none"}
    (tmp_path / "metrics/comparison.json").write_text(json.dumps(comparison))
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "tasks.commands.cli", *command]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (1, 141)
