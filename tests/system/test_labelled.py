"""The pipeline on labelled rows with KTO, run by `dvc repro` as a user does."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.support.project import change, execute, make_project

TRIAL = "kto-0.1-0.01-17"


@pytest.mark.slow
def test_kto_trains_on_thumbs_and_is_evaluated_like_other_losses(tmp_path, tiny_model_dir: Path):
    folder = make_project(tmp_path / "project", tiny_model_dir)
    pairs = pd.read_json(folder / "data/own/pairs.jsonl", lines=True)
    rows = pd.concat([
        pairs[["prompt", side, "split"]].rename(columns={side: "completion"}).assign(label=side == "chosen")
        for side in ("chosen", "rejected")
    ]).sort_index(kind="stable")  # fmt: skip
    rows.to_json(folder / "data/own/thumbs.jsonl", orient="records", lines=True)
    change(folder, {"data.source": "data/own/thumbs.jsonl"})
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
