"""The stages of training in rounds, with a tiny model, in DVC."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from dpo.common.files import sha256
from tests.support.models import chat_tokenizer, make_model
from tests.support.project import change, execute, make_project

NAME, RLOO = "online-2-sigmoid-0.1-0.01-17", "rloo-2-0.1-0.01-17"
HAS_TRL = find_spec("trl") is not None


def accuracies(project: Path) -> dict[str, list[str]]:
    """Return the rows of the report's table of accuracies: pairs, accuracy and its interval, by name."""
    section = (project / "reports/index.html").read_text().partition("<h2>Accuracy of reward models</h2>")[2]
    rows = re.findall(r"<tr>(<td.*?)</tr>", section.partition("</table>")[0], re.DOTALL)
    cells = [[text for text in re.split(r"<[^>]+>", row) if text.strip()] for row in rows]
    return {name: values for name, *values in cells}


@pytest.mark.slow
def test_rounds_are_trained_evaluated_and_compared(tmp_path):
    tokenizer = chat_tokenizer()
    model = make_model("llama", tmp_path / "model", vocab_size=len(tokenizer), eos_token_id=[*range(40, 80)])
    tokenizer.save_pretrained(model)
    project = make_project(tmp_path / "project", model)
    names = execute(project, "dvc", "stage", "list", "--name-only").split()
    assert not [name for name in names if "online" in name]
    settings = (project / "params.yaml").read_text()
    change(project, {"sweep.reference_free_losses": ["simpo"], "losses.simpo": {}, "sweep.rounds": [2]})
    names = execute(project, "dvc", "stage", "list", "--name-only").split()
    free = "online-2-simpo-0.1-0.01-17"
    assert {f"online_reference_free@{free}", f"evaluate_online_reference_free@{free}", f"online@{NAME}"} <= {
        *names
    }
    (project / "params.yaml").write_text(settings)
    (project / "functions/judges/own.py").write_text(
        "def vowels(prompts, responses):\n    return [float(r.count('e') + r.count('a')) for r in responses]\n"
    )
    change(
        project,
        {
            "sweep.rounds": [2],
            "sweep.rloo": [2],
            "sweep.reward_models": [17] if HAS_TRL else [],
            "feedback": "reward_model"
            if HAS_TRL
            else {"kind": "scorer", "function": "functions.judges.own:vowels"},
            "online": {"prompts": None, "answers": 3, "reference": "fixed"},
            "evaluate.max_new_tokens": 30,
            "sft": None,
            **{f"validate.rules.{rule}": "warn" for rule in ("mojibake", "control_characters", "special_tokens")},
        },
    )
    execute(project, "dvc", "repro")
    comparison = json.loads((project / "metrics/comparison.json").read_text())
    offline = NAME.removeprefix("online-2-")
    assert set(comparison["policies"]) == {NAME, RLOO, offline}
    costs = {name: row["cost"] for name, row in comparison["policies"].items()}
    assert costs[offline]["pairs"] == costs[offline]["prompts"] == 24
    assert (
        costs[offline]["sampled_tokens"] == 0 < costs[offline]["scored_tokens"] == costs[offline]["trained_tokens"]
    )
    assert costs[RLOO]["judged_answers"] == costs[NAME]["judged_answers"] == 72
    assert costs[RLOO]["pairs"] == 0 < costs[RLOO]["sampled_tokens"]
    assert all(
        cost["flops"] > 0 and cost["minutes"] > 0 and cost["peak_memory_gib"] > 0 for cost in costs.values()
    )
    shown = execute(project, "python", "-m", "tasks.commands.cli", "results")
    assert "24 / 24" in shown
    card = (project / f"models/{RLOO}.md").read_text()
    assert "reinforcement learning (RLOO, beta 0.1)" in " ".join(card.split())
    assert f"0 pairs of {costs[RLOO]['prompts']} prompts" in card
    if HAS_TRL:
        trained = json.loads((project / "metrics/reward_model/17.json").read_text())
        assert trained["accuracy"]["judge_pairs"] == 16
        assert trained["accuracy"]["human_ceiling"] == 0.75
        assert trained["cost"]["pairs"] == 24
        assert "accuracy of reward model 17 on 16 held-out pairs" in shown
        assert set(accuracies(project)) == {"reward model 17", *comparison["policies"], "people"}
        for name, metric, row in (
            ("reward model 17", "judge_accuracy", trained["accuracy"]),
            (offline, "reward_accuracy", comparison["policies"][offline]),
            ("people", "human_ceiling", comparison["policies"][offline]),
        ):
            low, high = row[f"{metric}_ci"]
            assert accuracies(project)[name] == ["16", f"{row[metric]:.3g}", f"{low:.3g} to {high:.3g}"]
        mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
        runs = mlflow.search_runs(experiment_names=["dpo-pipeline"], output_format="list")
        (run,) = (run for run in runs if run.info.run_name == "reward model 17")
        assert run.data.metrics["eval/accuracy/judge_accuracy"] == trained["accuracy"]["judge_accuracy"]
        assert {"train/loss", "eval/cost/minutes"} <= set(run.data.metrics)
    assert comparison["policies"][NAME]["trial"]["rounds"] == 2
    counts = json.loads((project / f"metrics/online/{NAME}.json").read_text())
    assert [each["answers"] for each in counts.values()] == [36, 36]
    answers = pd.read_parquet(project / f"rounds/{NAME}/round-2/answers.parquet")
    assert len(answers) == 36
    assert not (project / f".training-progress/{NAME}").exists()
    steps = pd.read_csv(project / f"metrics/train/{NAME}.csv")
    assert steps["step"].tolist() == [1, 2, 3]

    log = pd.read_csv(project / f"metrics/train/{RLOO}.csv")
    assert log["step"].tolist() == [1, 2, 3]
    assert {"score", "kl", "clip_ratio", "tokens", "flops"} <= set(log)
    page = (project / "reports/index.html").read_text()
    assert f'<td class="name">{RLOO}</td>' in page.partition("<h2>Cost</h2>")[2]

    weights = sha256(project / f"models/{NAME}/model.safetensors")
    execute(project, "dvc", "repro", "--force", "--single-item", f"online@{NAME}")
    assert sha256(project / f"models/{NAME}/model.safetensors") == weights
    wrong = execute(project, "python", "-m", "tasks.train", NAME, fails=True)
    assert "is not a trial of params.yaml" in wrong
