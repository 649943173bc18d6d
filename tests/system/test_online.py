"""The stages of training in rounds, with a tiny model, in DVC."""

import json

import pandas as pd
import pytest

from dpo.common.files import sha256
from tests.support.models import chat_tokenizer, make_model
from tests.support.project import change, execute, make_project

NAME = "online-2-sigmoid-0.1-0.01-17"


@pytest.mark.slow
def test_rounds_are_trained_evaluated_and_compared(tmp_path):
    tokenizer = chat_tokenizer()
    model = make_model("llama", tmp_path / "model", vocab_size=len(tokenizer), eos_token_id=[*range(40, 80)])
    tokenizer.save_pretrained(model)
    project = make_project(tmp_path / "project", model)
    names = execute(project, "dvc", "stage", "list", "--name-only").split()
    assert not [name for name in names if "online" in name]
    (project / "own_judge.py").write_text(
        "def vowels(prompts, responses):\n    return [float(r.count('e') + r.count('a')) for r in responses]\n"
    )
    change(
        project,
        {
            "sweep.rounds": [2],
            "feedback": {"kind": "scorer", "function": "own_judge:vowels"},
            "online": {"prompts": None, "answers": 3, "reference": "fixed"},
            "evaluate.max_new_tokens": 30,
            "sft": None,
            **{f"validate.rules.{rule}": "warn" for rule in ("mojibake", "control_characters", "special_tokens")},
        },
    )
    execute(project, "dvc", "repro")
    comparison = json.loads((project / "metrics/comparison.json").read_text())
    assert set(comparison["policies"]) == {NAME, NAME.removeprefix("online-2-")}
    assert comparison["policies"][NAME]["trial"]["rounds"] == 2
    counts = json.loads((project / f"metrics/online/{NAME}.json").read_text())
    assert [each["answers"] for each in counts.values()] == [36, 36]
    answers = pd.read_parquet(project / f"rounds/{NAME}/round-2/answers.parquet")
    assert len(answers) == 36
    assert not (project / f".training-progress/{NAME}").exists()
    steps = pd.read_csv(project / f"metrics/train/{NAME}.csv")
    assert steps["step"].tolist() == [1, 2, 3]

    weights = sha256(project / f"models/{NAME}/model.safetensors")
    execute(project, "dvc", "repro", "--force", "--single-item", f"online@{NAME}")
    assert sha256(project / f"models/{NAME}/model.safetensors") == weights
    wrong = execute(project, "python", "-m", "tasks.train", NAME, fails=True)
    assert "is not a trial of params.yaml" in wrong
