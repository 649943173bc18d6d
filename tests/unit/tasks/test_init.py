"""`dpo init`: a `params.yaml` that fits data and model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.training.losses import Kto
from tasks.commands.init import describe, init, model_choices, with_choices
from tests.support.hub import COMMIT, hub_with

ROOT = Path(__file__).parents[3]


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_model_dir):
    """Return a committed project with a tiny model and 400 pairs of a length of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    Path("data/own").mkdir(parents=True)
    shutil.copytree(tiny_model_dir, "models/own/tiny")
    numbers = range(400)
    pd.DataFrame({
        "prompt": [f"Say something about film {number}." for number in numbers],
        "chosen": [f"Film {number} is a joy and a delight, {number * 7} times." for number in numbers],
        "rejected": [f"Nobody should watch film {number}, not even {number * 3} people." for number in numbers],
    }).to_json("data/own/pairs.jsonl", orient="records", lines=True)  # fmt: skip
    for words in (["init", "-q"], ["add", "params.yaml"]):
        subprocess.run(["git", *words], check=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, "commit", "-qm", "start"], check=True)
    return tmp_path


def test_settings_fit_data_and_model_and_every_choice_has_a_comment(project, capsys):
    before = Path("params.yaml").read_text()
    init("data/own/pairs.jsonl", "models/own/tiny", force=False)
    params, text = load_params(), Path("params.yaml").read_text()
    assert (params.model.base, params.data.source) == ("models/own/tiny", "data/own/pairs.jsonl")
    assert 32 <= params.engine.max_length <= 512
    assert params.engine.max_length % 64 == 0
    assert params.dpo.epochs == 3, "360 pairs in steps of 16 are 23 steps per epoch"
    assert params.dpo.pairs_per_step == 16
    assert params.sweep.learning_rates == (2e-5,)
    assert params.evaluate.max_new_tokens == "auto"
    assert params.evaluate.judges == ()
    assert params.compare.select == "reward_accuracy"
    assert params.data.max_train_pairs is None
    changed = [line for line in text.splitlines() if line not in before.splitlines()]
    assert len(changed) == 16
    assert all("  # " in line for line in changed)
    assert "engine.max_length: " in capsys.readouterr().out
    with pytest.raises(InputError, match="uncommitted changes"):
        init("data/own/pairs.jsonl", "models/own/tiny", force=False)
    init("data/own/pairs.jsonl", "models/own/tiny", force=True)
    assert Path("params.yaml").read_text() == text, "a second run chooses the same"


def test_labelled_rows_are_trained_with_kto_and_its_settings_are_kept(project):
    pairs = pd.read_json("data/own/pairs.jsonl", lines=True)
    rows = [
        pairs[["prompt", side]].rename(columns={side: "completion"}).assign(label=side == "chosen")
        for side in ("chosen", "rejected")
    ]
    pd.concat(rows).to_json("data/own/thumbs.jsonl", orient="records", lines=True)
    text = (
        Path("params.yaml").read_text().replace("  rpo:", "  kto: {undesirable_weight: 1.5}\n  simpo: {}\n  rpo:")
    )
    Path("params.yaml").write_text(text.replace("reference_free_losses: []", "reference_free_losses: [simpo]"))
    init("data/own/thumbs.jsonl", None, force=True)
    params = load_params()
    assert {trial.loss for trial in params.trials()} == {Kto(undesirable_weight=1.5)}


def test_without_supervised_fine_tuning_its_settings_are_left_out(project):
    text = Path("params.yaml").read_text()
    section = text[text.index("sft:") : text.index("dpo:")]
    Path("params.yaml").write_text(text.replace(section, "sft: null\n\n"))
    init("data/own/pairs.jsonl", None, force=True)
    assert load_params().sft is None


def test_data_outside_of_the_project_and_a_model_that_is_no_folder_are_refused(project):
    shutil.copy("data/own/pairs.jsonl", "pairs.jsonl")
    before = Path("params.yaml").read_bytes()
    with pytest.raises(InputError, match=r"pairs\.jsonl: not in data/own"):
        init("pairs.jsonl", None, force=False)
    with pytest.raises(InputError, match="--revision: models/own/tiny is not a hub id"):
        init("data/own/pairs.jsonl", "models/own/tiny", "main", force=False)
    with pytest.raises(InputError, match="--model: a/b/c is neither a folder nor a hub id"):
        init("data/own/pairs.jsonl", "a/b/c", force=False)
    assert Path("params.yaml").read_bytes() == before


@pytest.mark.parametrize(("size", "rate"), [(1.35e8, 2e-5), (5e8, 5e-6), (3e9, 1e-6), (8e9, 5e-7)])
def test_larger_models_have_smaller_learning_rates(size, rate):
    assert model_choices(None, size)["sweep.learning_rates"][0] == [rate]


def test_the_size_of_a_model_is_the_number_of_its_parameters(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    described = describe(str(tiny_model_dir))
    parameters = AutoModelForCausalLM.from_pretrained(tiny_model_dir).num_parameters()
    assert described.parameters == pytest.approx(parameters, rel=0.05)
    assert described.context == 512


def run_init(project, endpoint, *options):
    """Run the command with a hub of its own, and return the process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(project / "hf")}
    env.pop("HF_HUB_OFFLINE", None)
    words = [sys.executable, "-m", "tasks.commands.cli", "init", "data/own/pairs.jsonl", *options]
    return subprocess.run(words, cwd=project, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_configuration_and_the_tokenizer_of_a_hub_id_are_read_and_its_commit_is_set(project, tiny_model_dir):
    with hub_with("someone/tiny", tiny_model_dir) as (endpoint, requested):
        done = run_init(project, endpoint, "--model", "someone/tiny", "--revision", "main")
    assert done.returncode == 0, done.stderr
    assert not [path for path in requested if "safetensors" in path], "weights are not downloaded"
    params = load_params()
    assert (params.model.base, params.model.revision) == ("someone/tiny", COMMIT)
    hub_length = params.engine.max_length
    assert "the model reads 512 tokens" in Path("params.yaml").read_text()
    init("data/own/pairs.jsonl", "models/own/tiny", force=True)
    params = load_params()
    assert (params.model.base, params.model.revision) == ("models/own/tiny", None)
    assert params.engine.max_length == hub_length, "lengths are those of the same tokenizer"


def test_without_an_index_of_the_weights_the_size_follows_from_the_configuration(tmp_path, tiny_model_dir):
    expected = describe(str(tiny_model_dir)).parameters
    folder = shutil.copytree(tiny_model_dir, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    assert describe(str(folder)).parameters == pytest.approx(expected, rel=0.05)
    index = {"metadata": {"total_size": 12_000_000_000}, "weight_map": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert describe(str(folder)).parameters == 3_000_000_000


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_read_is_one_error_and_changes_nothing(project, tiny_model_dir, tmp_path):
    before = Path("params.yaml").read_bytes()
    with hub_with("someone/tiny", tiny_model_dir) as (endpoint, _):
        absent = run_init(project, endpoint, "--model", "someone/absent")
        wrong = run_init(project, endpoint, "--model", "someone/tiny", "--revision", "absent")
    gone = run_init(project, endpoint, "--model", "someone/tiny")
    (empty := tmp_path / "empty").mkdir()
    (empty / "README.md").write_text("none")
    with hub_with("someone/empty", empty) as (endpoint, _):
        no_model = run_init(project, endpoint, "--model", "someone/empty")
    for done, code, words in (
        (
            absent,
            2,
            "error: --model: someone/absent is not a folder, and the hub has no such model that you can read",
        ),
        (wrong, 2, "the hub has no such model at the revision absent"),
        (gone, 75, "error: --model: someone/tiny is not a folder, and the hub at http://127.0.0.1:"),
        (no_model, 2, "error: --model: someone/empty has no config.json"),
    ):
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert done.stderr.count("error:") == 1, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error:")
    assert Path("params.yaml").read_bytes() == before


def test_values_are_replaced_or_added_and_other_lines_are_kept():
    text = "a:\n  x: 1  # old\n  list:   # of\n  - k: 1\n    l: 2\n\nb:\n  y: 2\n"
    changed = with_choices(text, {"a.list": ([], "none"), "b.z": ("auto", "new"), "a.x": (5e-6, "less")})
    assert changed == "a:\n  x: 5e-06  # less\n  list: []  # none\n\nb:\n  z: auto  # new\n  y: 2\n"
