"""The stage `capabilities` in DVC, with a local task of lm_eval."""

import json
import re
import shutil
import sys

import pytest

from tests.support.capabilities import NAME, ROWS, write_task
from tests.support.project import TRIAL, change, execute, make_project
from tools.browser import dom


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
    if shutil.which("chromium") is None:
        pytest.skip("the page itself needs Chromium")
    page = project / "reports/index.html"
    table = shown_table(page)
    policy, reference, base = (result["models"][name]["value"] for name in (TRIAL, "reference", "base model"))
    difference = result["differences"]["reference"]
    assert [float(table[name][0]) for name in (TRIAL, "reference", "base model")] == pytest.approx(
        [policy, reference, base], rel=0.01
    )
    assert float(table["reference"][1]) == pytest.approx(difference["difference"], rel=0.01)
    assert float(table["reference"][2]) == pytest.approx(difference["p"], rel=0.01)
    low, high = result["models"][TRIAL]["value_ci"]
    assert table[TRIAL][3] == f"{low:.3g} to {high:.3g}"
    script = project / f"reports/capabilities/{NAME}.js"
    script.write_text(script.read_text().replace(f'"policy": "{TRIAL}"', '"policy": "other"'))
    assert shown_table(page) == {}, "results of another policy are not shown"
    script.unlink()
    assert shown_table(page) == {}, "without results there is no table"


def shown_table(page):
    """Return value, difference, p and the value's interval by model, as a browser shows them."""
    html = dom(f"file://{page}")
    section = re.search(r'<div id="capabilities"( hidden="")?>(.*?)</table>', html, re.DOTALL)
    if section[1]:
        return {}
    rows = re.findall(r"<tr><td.*?</tr>", section[2], re.DOTALL)
    found = {}
    for row in rows:
        cells = re.findall(r"<td[^>]*>(.*?)(?:<small>(.*?)</small>)?</td>", row)
        (_, _, _, (model, _), (value, ends), (difference, _), (p, _)) = cells
        found[model] = (value, difference, p, ends)
    return found
