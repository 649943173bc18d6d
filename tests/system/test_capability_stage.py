"""The stage `capabilities` in DVC, with a local task of lm_eval."""

import json
import sys

import pytest

from tests.support.capabilities import NAME, ROWS, write_task
from tests.support.project import TRIAL, change, execute, make_project


@pytest.mark.slow
def test_a_local_task_runs_on_the_selected_policy_the_reference_and_the_base_model(tmp_path, tiny_model_dir):
    pytest.importorskip("lm_eval", reason="lm_eval: installed with the capabilities extra")
    project = make_project(tmp_path / "project", tiny_model_dir)
    names = execute(project, "dvc", "stage", "list", "--name-only").split()
    assert not [name for name in names if "capabilities" in name], "without tasks there is no stage"
    write_task(project)
    change(project, {"capabilities.tasks": [NAME], "compare.guardrails.max_loss_rise": 100.0})
    execute(project, "dvc", "repro")
    result = json.loads((project / f"metrics/capabilities/{NAME}.json").read_text())
    assert (result["task"], result["policy"], result["metric"]) == (NAME, TRIAL, "acc")
    assert result["examples"] == len(ROWS)
    assert set(result["models"]) == {TRIAL, "reference", "base model"}
    assert set(result["differences"]) == {"reference", "base model"}
    shown = execute(project, sys.executable, "-m", "tasks.commands.cli", "results")
    assert f"{NAME}, acc on {len(ROWS)} examples: {TRIAL} {result['models'][TRIAL]['value']:.3f}" in shown
    assert "up to date" in execute(project, "dvc", "status")
