"""Accuracy of judges on held-out pairs, and agreement between judges."""

import pandas as pd
import pytest
from transformers import AutoTokenizer

from dpo.evaluation.judges.accuracy import judge_accuracy
from dpo.evaluation.judges.scorer import Scorer
from dpo.evaluation.response_metrics import response_metrics


def length(prompts, responses):
    return [len(response) for response in responses]


def constant(prompts, responses):
    return [0.0] * len(responses)


@pytest.fixture
def held_out():
    chosen = ["longer text"] * 15 + ["x"] * 3 + ["same"] * 2
    rejected = ["text"] * 15 + ["longer"] * 3 + ["also"] * 2
    prompts = [f"prompt {number}" for number in range(20)]
    return pd.DataFrame({"prompt": prompts, "chosen": chosen, "rejected": rejected, "turns": None, "tools": None})


def test_accuracy_is_the_share_of_pairs_in_which_the_judge_prefers_chosen(held_out, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    judges = [Scorer("length", length, "key"), Scorer("constant", constant, "key")]
    metrics = judge_accuracy(judges, held_out, tokenizer, 96, 3)
    assert metrics["judge_pairs"] == 20
    assert metrics["judge_accuracy"] == pytest.approx((15 + 0.5 * 2) / 20)
    low, high = metrics["judge_accuracy_ci"]
    assert 0.5 < low < 0.8 < high < 1
    assert metrics["judge_accuracy/constant"] == 0.5
    assert judge_accuracy(judges, held_out, tokenizer, 5, 3)["judge_pairs"] == 5
    assert judge_accuracy([], held_out, tokenizer, 5, 3) == {}


def test_accuracy_travels_with_the_table_of_the_references_responses(held_out, tmp_path):
    held_out.attrs |= {"judge_pairs": 20, "judge_accuracy": 0.8, "judge_accuracy_ci": [0.6, 0.9]}
    held_out.to_parquet(tmp_path / "reference.parquet", index=False)
    assert pd.read_parquet(tmp_path / "reference.parquet").attrs == held_out.attrs


def test_agreement_between_judges_by_hand():
    table = pd.DataFrame({
        "prompt": [*"abcde"], "response": "word", "ids": [[1, 0]] * 5, "reference_ids": [[2, 0]] * 5,
        "finished": True, "reference_finished": True, "kl": 1.0, "entropy": 1.0, "implicit_reward": 0.0,
        "win": [1, 1, 0, 0.5, None], "win/other": [0.75, 0, 0.25, 1, 1],
    })  # fmt: skip
    assert response_metrics(table, 0)["same_verdict/other"] == 2 / 4
