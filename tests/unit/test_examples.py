"""The parameter files in `examples/` are complete and can be planned."""

import re
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from typer.testing import CliRunner

from dpo.config import load_params
from tasks.commands.cli import app

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
FULL = ("full-1b-24gb", "arithmetic", "arithmetic-methods")
"""Examples that train all weights."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_a_whole_parameter_file(path):
    params = load_params(path)
    assert path.read_text().startswith("# ")
    assert params.trials()
    is_adapter = params.model.adapter == "continue"
    assert (params.dpo.lora is None) == (is_adapter or path.stem in FULL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dvc_finds_every_key_of_an_example_that_a_stage_names(path, tmp_path):
    """DVC knows no defaults: `dvc repro` stops at a key of `dvc.yaml` that the file lacks."""
    shutil.copy("dvc.yaml", tmp_path)
    shutil.copy(path, tmp_path / "params.yaml")
    with chdir(tmp_path):
        stages = list(Repo.init(no_scm=True).index.stages)
        tracked = [dep for stage in stages for dep in stage.deps if isinstance(dep, ParamsDependency)]
        assert all(dep.get_hash() for dep in tracked)
    assert len(tracked) > len(load_params(path).trials())


@pytest.mark.parametrize(
    ("name", "model", "gib"),
    [
        ("instruct-lora-24gb", "llama-8b", 24),
        ("nf4-70b-80gb", "llama-70b", 80),
        ("full-1b-24gb", "llama-1b", 24),
        ("separate-sft-data", "llama-1b", 24),
        ("continued-adapter", "llama-8b", 24),
        ("thumbs", "llama-1b", 24),
    ],
)
def test_every_stage_of_an_example_is_planned_to_fit(name, model, gib):
    arguments = ["--params", str(EXAMPLES / f"{name}.yaml"), "--model", model, "--gpu-memory", str(gib)]
    done = CliRunner().invoke(app, ["plan", *arguments, "--pairs", "10000"])
    assert done.exit_code == 0, done.output
    stages = done.output.split("| training |")[0]
    assert "too much" not in stages
    assert re.search(r"\| train \| [1-9][\d.]* \|", stages)


def test_the_examples_cover_the_cases_of_their_list():
    listed = re.findall(r"^\| \[(\S+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [path.name for path in FILES]
    by_name = {path.stem: load_params(path) for path in FILES}
    assert by_name["instruct-lora-24gb"].sft is None
    assert by_name["nf4-70b-80gb"].engine.quantization == "nf4"
    assert by_name["full-1b-24gb"].dpo.optimizer == "adamw_8bit"
    assert by_name["separate-sft-data"].demonstrations.origin == "data/own/demonstrations.jsonl"
    assert [judge.kind for judge in by_name["arithmetic"].evaluate.judges] == ["verifier"]
    methods = [(trial.method, trial.rounds) for trial in by_name["arithmetic-methods"].trials()]
    assert methods == [(None, None), ("online", 1), ("online", 4), ("rloo", 4)]
    assert [trial.loss.name for trial in by_name["thumbs"].trials()] == ["kto", "kto"]
    assert by_name["continued-adapter"].model.adapter == "continue"
