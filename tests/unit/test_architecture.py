"""Imports only go down, and DVC knows every package that the result of a stage depends on."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
NO_DEPS = {
    "dpo/config.py": "it only reads params.yaml, which DVC tracks by key",
    "dpo/planner.py": "a stage that does not fit stops; the plan does not change a result",
    "dpo/data/reasoning.py": "settings read its problems; stages that score with it declare it",
    "dpo/data/rules.py": "names and actions of the rules, for the settings of the validation",
    "dpo/data/settings.py": "types of settings; stages that use the data depend on the whole of dpo/data",
    "dpo/evaluation/settings.py": "types of settings; stages that evaluate depend on the whole of dpo/evaluation",
    "dpo/online/settings.py": "types of settings; the stage `online` depends on the whole of dpo/online",
    "dpo/training/settings.py": "types of settings; stages that train depend on the whole of dpo/training",
    "dpo/training/losses": "all stages read the settings in it; those that use its code declare it",
    "dpo/engine/settings.py": "types of settings; stages that run the model depend on the whole of dpo/engine",
    "tasks/tracking": "logging does not change a result",
}
"""Modules and packages that are no deps, and why."""

LAYERS = ["dpo", "tasks", "tasks.commands", "flows"]
"""Each may import those before it, and no other part of the project."""

DPO_LAYERS = ["common", "engine", "data", "training", "evaluation", "online", "config", "planner"]
"""Order of the parts of `dpo`; each may import those before it. Settings modules may be imported from anywhere."""


def modules(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path, *, on_first_use=True):
    """Yield the names that a module imports, also those in functions unless `on_first_use` is off."""
    waiting = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        elif on_first_use or not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)


def imported_files(path, *, on_first_use=True):
    """Return the project's files that a module imports, directly or not, and all names that they import."""
    files, names, waiting = {path}, set(), [path]
    while waiting:
        found = set(imports(waiting.pop(), on_first_use=on_first_use))
        names |= found
        parts = [name.split(".") for name in found]
        places = {ROOT.joinpath(*each[:n]) for each in parts for n in range(1, len(each) + 1)}
        candidates = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
        new = {file for file in candidates if file.is_file()} - files
        files |= new
        waiting += new
    return {file.relative_to(ROOT) for file in files}, names


def layer(module):
    found = [name for name in LAYERS if module == name or module.startswith(f"{name}.")]
    return max(map(LAYERS.index, found)) if found else None


@pytest.mark.parametrize("folder", ["dpo", "tasks", "flows"])
def test_imports_go_down(folder):
    wrong = [
        (module, name)
        for module, path in modules(folder)
        for name in imports(path)
        if layer(name) is not None and layer(name) > layer(module)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("dpo", {"prefect", "dvc", "mlflow"}), ("tasks", {"prefect", "dvc"})],
)
def test_tools_stay_out_of_the_layers_below_them(folder, forbidden):
    assert not {name.split(".")[0] for _, path in modules(folder) for name in imports(path)} & forbidden


def test_the_packages_of_dpo_import_each_other_in_one_direction():
    wrong = []
    for module, path in modules("dpo"):
        parts = module.split(".")
        if len(parts) < 2 or parts[-1] == "settings":
            continue
        for name in imports(path):
            target = name.split(".")
            inside = target[0] == "dpo" and len(target) > 1 and "settings" not in target
            if inside and DPO_LAYERS.index(target[1]) > DPO_LAYERS.index(parts[1]):
                wrong.append((module, name))
    assert not wrong


def module_of(stage):
    """Return the file of the module that a stage runs."""
    return ROOT / (STAGES[stage]["cmd"].split()[2].replace(".", "/") + ".py")


def test_the_modules_in_tasks_are_those_that_stages_run():
    modules = {path for path in (ROOT / "tasks").glob("*.py") if path.stem != "__init__"}
    assert modules == {module_of(stage) for stage in STAGES}


def test_trials_of_reference_free_losses_do_not_depend_on_reference_log_probs_of_the_training_pairs():
    for name in ("train", "evaluate", "online", "evaluate_online"):
        stage, free = STAGES[name], STAGES[f"{name}_reference_free"]
        missing = {"reference/train"} if name == "train" else set()
        assert set(stage["deps"]) - set(free["deps"]) == missing
        assert not set(free["deps"]) - set(stage["deps"])
        for key in stage.keys() - {"desc", "matrix", "deps"}:
            assert stage[key] == free[key]


def test_the_default_flow_has_the_five_steps_of_the_method():
    asked = ["validate", "sft", "reference_logprobs", "train", "evaluate"]
    assert [stage for stage in STAGES if stage in asked] == asked
    assert "pandera" in (ROOT / "dpo/data/schema.py").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_a_stage_imports_is_among_its_deps(stage):
    found, _ = imported_files(module_of(stage))
    found = {file for file in found if file.name != "__init__.py"}
    declared = [Path(dep) for dep in STAGES[stage]["deps"]]
    known = [*declared, *map(Path, NO_DEPS)]
    assert not {m for m in found if not any(m == d or d in m.parents for d in known)}
    code_deps = [d for d in declared if d.parts[0] in ("dpo", "tasks")]
    unused = [d for d in code_deps if not any(m == d or d in m.parents for m in found)]
    assert not unused, "declared, yet not imported"


HEAVY = {"torch", "transformers", "mlflow", "prefect", "datasets", "scipy", "matplotlib", "plotly"}
MODEL = {"torch", "transformers", "scipy"}  # transformers imports scipy
MAY_IMPORT = {
    "tasks.fetch_model": MODEL,
    "tasks.ingest": set(),
    "tasks.validate": {"scipy"},
    "tasks.tokens": MODEL | {"datasets"},
    "tasks.sft": MODEL | {"mlflow", "datasets"},
    "tasks.reference_logprobs": MODEL | {"datasets"},
    "tasks.reference_samples": MODEL | {"datasets"},
    "tasks.train": MODEL | {"mlflow", "datasets"},
    "tasks.online": MODEL | {"mlflow", "datasets"},
    "tasks.reward_model": MODEL | {"datasets"},
    "tasks.rloo": MODEL | {"mlflow", "datasets"},
    "tasks.evaluate": MODEL | {"datasets"},
    "tasks.compare": {"scipy", "plotly"},
    "tasks.capabilities": MODEL,
    "tasks.commands.cli": set(),
    "tasks.commands.landed": {"scipy"},
    "tasks.commands.chat": set(),
    "tasks.commands.init": set(),
    "tasks.commands.lineage": set(),
    "tasks.commands.merge": set(),
    "tasks.commands.plan": set(),
    "tasks.commands.promote": MODEL | {"mlflow"},
    "tasks.commands.publish": set(),
    "tasks.commands.results": set(),
    "tasks.commands.sample": set(),
    "tasks.commands.tune": {"mlflow", "scipy"},
    "tasks.commands.validate": {"scipy"},
    "tasks.tracking.offline": {"mlflow", "scipy"},
}
"""The heavy packages that stages and commands may import before their work begins. MLflow imports scipy."""


def test_every_stage_and_command_says_what_it_may_import():
    modules = [*(ROOT / "tasks").glob("*.py"), *(ROOT / "tasks/commands").glob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules if path.stem != "__init__"}
    assert names | {"tasks.tracking.offline"} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", [module for module, allowed in MAY_IMPORT.items() if "torch" not in allowed])
def test_a_stage_or_command_imports_no_other_heavy_package(module):
    code = f"import sys, {module}; print(*{HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= MAY_IMPORT[module]


@pytest.mark.parametrize("module", [module for module, allowed in MAY_IMPORT.items() if "torch" in allowed])
def test_a_module_that_runs_a_model_imports_no_other_heavy_package(module):
    """Read the imports at the top of the project's modules: importing torch for each case would take a minute."""
    _, names = imported_files(ROOT.joinpath(*module.split(".")).with_suffix(".py"), on_first_use=False)
    assert {name.split(".")[0] for name in names} & HEAVY <= MAY_IMPORT[module]


@pytest.mark.parametrize("losses", ["losses", "reference_free_losses"])
@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_trial_depends_on_the_settings_of_its_own_loss_and_on_no_list_of_the_sweep(stage, losses):
    stage += "_reference_free" if losses == "reference_free_losses" else ""
    assert "losses.${item.loss}" in STAGES[stage]["params"]
    assert not {"losses", "sweep"} & set(STAGES[stage]["params"])
    assert list(STAGES[stage]["matrix"]) == ["loss", "beta", "learning_rate", "seed"]
    assert STAGES[stage]["matrix"] == {
        "loss": f"${{sweep.{losses}}}",
        "beta": "${sweep.betas}",
        "learning_rate": "${sweep.learning_rates}",
        "seed": "${sweep.seeds}",
    }


@pytest.mark.parametrize("stage", ["train", "evaluate", "compare"])
def test_stages_that_compute_losses_depend_on_their_code(stage):
    assert {"dpo/training", "dpo/training/losses"} & set(STAGES[stage]["deps"])


def test_sections_that_dvc_depends_on_are_in_params_yaml():
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    for stage in STAGES.values():
        for key in stage.get("params", []):
            if key == "losses.${item.loss}":
                key = "losses.sigmoid"
            value = params
            for part in key.split("."):
                value = value[part]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_depend_on_the_functions_of_the_user_that_they_call(stage):
    used = {
        "functions/losses": ("train", "online", "evaluate"),
        "functions/judges": ("online", "rloo", "evaluate", "reference_samples"),
    }
    expected = {folder for folder, stages in used.items() if module_of(stage).stem in stages}
    assert {dep for dep in STAGES[stage].get("deps", []) if dep.startswith("functions")} == expected


def test_dvc_yaml_starts_with_a_stage_and_stays_short():
    lines = (ROOT / "dvc.yaml").read_text().splitlines()
    assert lines[0] == "stages:"
    assert len(lines) <= 200


def test_telemetry_is_off():
    done = subprocess.run(
        [sys.executable, "-c", "import os, tasks; print(*(os.environ[n] for n in tasks.TELEMETRY_OFF))"],
        cwd=ROOT, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.stdout.split() == ["true", "true", "1", "true", "false"]
