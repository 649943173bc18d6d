"""`dpo lineage`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model
from dpo.training.train import save_checkpoint
from tasks.commands.lineage import of_folder

ROOT = Path(__file__).parents[3]
FACTS = {"git_commit": "abc", "data": {"data/train.parquet": "123"}, "params": {"trial": {"beta": 0.1}}}


@pytest.fixture
def checkpoint(tiny_model_dir, tmp_path):
    save_checkpoint(
        load_model(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / "m", FACTS
    )
    return tmp_path / "m"


def lineage(*words):
    done = subprocess.run(
        [sys.executable, "-m", "tasks.commands.cli", "lineage", *words], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_lineage_of_a_copied_checkpoint_is_printed_as_text_and_as_json(checkpoint, tmp_path):
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere/model")
    code, shown, _ = lineage(str(moved))
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert rows["git_commit"] == "abc"
    assert rows["data.data/train.parquet"] == "123"
    assert rows["params.trial.beta"] == "0.1"
    assert len(rows["weights"]) == 64
    assert json.loads(lineage(str(moved), "--json")[1]) == of_folder(moved)


def test_changed_weights_are_refused(checkpoint):
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(InputError, match=r"the weights differ from those of provenance\.json"):
        of_folder(checkpoint)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "{", '{"weight": 1}'])
def test_a_folder_without_a_readable_provenance_file_is_refused(checkpoint, text):
    (checkpoint / "provenance.json").unlink()
    if text is not None:
        (checkpoint / "provenance.json").write_text(text)
    code, _, errors = lineage(str(checkpoint))
    assert code == 2
    assert "provenance.json cannot be read" in errors
    assert "Traceback" not in errors
