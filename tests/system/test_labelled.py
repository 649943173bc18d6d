"""The pipeline on labelled rows with KTO, run by `dvc repro` as a user does."""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.support.project import change, execute, make_project

TRIAL = "kto-0.1-0.01-17"
OTHER = "kto-0.05-0.01-17"
UNLIMITED = ("max_displacement", "max_perplexity_ratio", "max_length_ratio", "max_loss_rise")
SHARES = ("max_repetition_rise", "max_unfinished_rise", "max_empty")


def labelled_project(place: Path, model: Path) -> Path:
    """Return a project whose data has a completion with a label in each row."""
    folder = make_project(place, model)
    pairs = pd.read_json(folder / "data/own/pairs.jsonl", lines=True)
    rows = pd.concat([
        pairs[["prompt", side, "split"]].rename(columns={side: "completion"}).assign(label=side == "chosen")
        for side in ("chosen", "rejected")
    ]).sort_index(kind="stable")  # fmt: skip
    rows.to_json(folder / "data/own/thumbs.jsonl", orient="records", lines=True)
    change(folder, {"data.source": "data/own/thumbs.jsonl"})
    return folder


@pytest.mark.slow
def test_kto_trains_on_thumbs_and_is_evaluated_like_other_losses(tmp_path, tiny_model_dir: Path):
    folder = labelled_project(tmp_path / "project", tiny_model_dir)
    refused = execute(folder, "dvc", "repro", fails=True)
    assert (
        "sweep.losses: sigmoid needs pairs, but the rows of the data have one completion with a label" in refused
    )
    assert "Running stage 'sft'" not in refused
    change(folder, {"sweep.losses": ["kto"], "losses.kto": {}})
    execute(folder, "dvc", "repro")
    log = pd.read_csv(folder / f"metrics/train/{TRIAL}.csv")
    assert log["loss"].iloc[0] == pytest.approx(0.5, abs=1e-6)
    assert log["rewards/margins"].iloc[-1] > 0
    metrics = json.loads((folder / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert metrics["pairs"] == 32
    assert 0 <= metrics["reward_auc"] <= 1
    assert metrics["loss"] < 0.6
    assert {"reward_accuracy", "margin", "kl", "win_rate", "perplexity", "chosen_logp_change"} <= metrics.keys()
    assert (folder / "reports/index.html").is_file()
    assert "selected" in json.loads((folder / "metrics/comparison.json").read_text())
    change(folder, {"compare.select": "reward_accuracy"})
    execute(folder, "dvc", "repro")


@pytest.mark.slow
def test_a_policy_of_labelled_rows_is_promoted_and_defends_its_place(tmp_path, tiny_model_dir: Path):
    folder = labelled_project(tmp_path / "project", tiny_model_dir)
    settings = {"sweep.losses": ["kto"], "losses.kto": {}, "promote": {"nights": 1}, "dpo.epochs": 3}
    no_judge = {"evaluate.judges": [], "compare.select": "reward_accuracy", "compare.max_kl": 1e6}
    unlimited = {f"compare.guardrails.{name}": 1e6 for name in UNLIMITED}
    unlimited |= {f"compare.guardrails.{name}": 1.0 for name in SHARES}
    params = yaml.safe_load(
        (folder / "params.yaml").read_text()
    )  # ruamel cannot keep comments of a list it empties
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    change(folder, settings | no_judge | unlimited)

    first = rerun_and_promote(folder, {})
    assert first["promoted"], first["reason"]
    assert first["evidence"]["figure"] == "reward accuracy"
    assert first["evidence"]["against"] == "the reference"
    assert "held-out rows" in first["details"], first["details"]
    assert "training rows: 48" in first["details"]
    again = rerun_and_promote(folder, {})
    assert again["reason"] == f"{TRIAL} is the champion already, version 1."

    ranked = rerun_and_promote(folder, {"sweep.betas": [0.05]})
    assert not ranked["promoted"]
    assert ranked["challenger"] == OTHER
    assert ranked["evidence"]["figure"] == "win rate in ranking held-out rows"
    assert ranked["evidence"]["against"] == "the champion, version 1"

    scorer = {"kind": "scorer", "function": "dpo.evaluation.judges.scorer:vader_compound"}
    judged = rerun_and_promote(folder, {"evaluate.judges": [scorer], "compare.select": "win_rate"})
    assert judged["evidence"]["figure"] == "win rate"
    assert "8 new responses of each" in judged["reason"]
    assert "judge; the comparison is valid" in judged["reason"]

    prompts = pd.DataFrame({"prompt": [f"What of play {number}?" for number in range(9)]})
    prompts.to_json(folder / "data/own/prompts.jsonl", orient="records", lines=True)
    separate = rerun_and_promote(folder, {"evaluate.prompts": "data/own/prompts.jsonl"})
    assert separate["evidence"]["figure"] == "win rate"
    assert "evaluate.prompts; the comparison is valid" in separate["reason"]


def rerun_and_promote(folder: Path, settings: dict[str, object]) -> dict[str, Any]:
    """Change settings, run stale stages, commit the results and return the verdict of the gate."""
    change(folder, settings)
    execute(folder, "dvc", "repro")
    author = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    execute(folder, "git", "add", "-A")
    execute(folder, "git", *author, "commit", "--allow-empty", "-qm", "results")
    execute(folder, sys.executable, "-m", "tasks.commands.cli", "promote")
    return json.loads((folder / "reports/gate.json").read_text())
