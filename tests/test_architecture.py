"""The rules of the house: imports go down, and DVC knows every module that a stage's result depends on."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def imported_packages(folder: str) -> set[str]:
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("dpo", {"tasks", "flows", "prefect", "dvc", "mlflow"}), ("tasks", {"flows", "prefect", "dvc"})],
)
def test_imports_go_down(folder, forbidden):
    assert not imported_packages(folder) & forbidden


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_a_stage_imports_is_among_its_deps(stage):
    code = (
        f"import sys, tasks.{stage}\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('dpo', 'tasks')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    modules = {Path(f).relative_to(ROOT) for f in done.stdout.split()}
    modules = {m for m in modules if m.name != "__init__.py"}
    declared = [Path(dep) for dep in STAGES[stage]["deps"]]
    missing = {m for m in modules if not any(m == d or d in m.parents for d in declared)}
    assert not missing
    code_deps = {d for d in declared if d.suffix == ".py"}
    assert not code_deps - modules, "declared, yet not imported"


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_cell_depends_on_the_settings_of_its_own_loss_and_on_no_list_of_the_sweep(stage):
    assert "losses.${item.loss}" in STAGES[stage]["params"]
    assert not {"losses", "sweep"} & set(STAGES[stage]["params"])
    assert STAGES[stage]["matrix"] == {
        "loss": "${sweep.losses}",
        "beta": "${sweep.betas}",
        "learning_rate": "${sweep.learning_rates}",
        "seed": "${sweep.seeds}",
    }


def test_telemetry_is_off():
    done = subprocess.run(
        [sys.executable, "-c", "import os, tasks; print(*(os.environ[n] for n in tasks.QUIET))"],
        cwd=ROOT, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stdout.split() == ["true", "true", "1", "true", "false"]
