"""The report's page: names of policies, the order of the responses, and the accuracy of rewards."""

import pandas as pd
import pytest

from tasks.report.comparison import held_out_accuracies, with_names
from tasks.report.responses import EXTREMES, MAX_RESPONSES, extremes, gains, shown_responses


def table(gain):
    """Return responses whose scores are above the reference's by `gain`."""
    scores = pd.Series(gain, dtype=float)
    return pd.DataFrame({"prompt": "p", "response": [f"r{i}" for i in range(len(gain))], "score": scores,
                         "reference_score": 0.0, "win": (scores > 0).astype(float)})  # fmt: skip


def turns(count):
    return [[{"role": "user", "content": f"prompt {i}"}] for i in range(count)]


def test_names_are_marked_and_all_text_is_escaped():
    marked = with_names("dpo-0.1 <b> beats dpo-0.15, not odd.", ["dpo-0.1", "dpo-0.15", "o"])
    assert str(marked).startswith("<code>dpo-0.1</code> &lt;b&gt; beats <code>dpo-0.15</code>")


def test_the_worst_losses_and_the_biggest_wins_of_the_selected_policy_are_shown():
    gain = [0.0, -0.5, 2.0, -3.0, 1.0, float("nan"), -1.0, -0.1, 0.2, 0.3]
    found = extremes({"other": table([1.0] * 10), "mine": table(gain)}, turns(10), "mine")
    assert found["policy"] == "mine"
    assert [row["gain"] for row in found["losses"]] == [-3.0, -1.0, -0.5]
    assert [row["gain"] for row in found["wins"]] == [2.0, 1.0, 0.3]
    assert found["losses"][0]["turns"][0]["content"] == "prompt 3"
    assert extremes({"only": table([0.0, 0.0])}, turns(2), None) == {"policy": "only", "losses": [], "wins": []}
    assert EXTREMES == 3


@pytest.mark.parametrize("losses", [10, 80, 200])
def test_the_table_starts_with_the_worst_losses_then_has_the_biggest_wins(losses):
    gain = [-1 - i for i in range(losses)] + [1 + i for i in range(210 - losses)]
    shown = [row["gain"] for row in shown_responses({"mine": table(gain)}, turns(210))]
    assert len(shown) == MAX_RESPONSES
    assert shown[0] == -losses
    lost = [value for value in shown if value < 0]
    assert shown[: len(lost)] == sorted(lost)
    assert shown[len(lost) :] == sorted(shown[len(lost) :], reverse=True)
    assert shown[len(lost)] == 210 - losses


def test_without_scores_the_verdict_is_the_gain_and_without_a_judge_the_order_is_kept():
    judged = table([1.0, -1.0]).drop(columns=["score", "reference_score"])
    assert gains(judged).tolist() == [0.5, -0.5]
    plain = judged.drop(columns="win")
    assert gains(plain).isna().all()
    assert [row["response"] for row in shown_responses({"mine": plain}, turns(2))] == ["r0", "r1"]


def accuracy(name, value):
    return {name: value, f"{name}_ci": [value - 0.1, value + 0.1]}


def test_accuracy_of_reward_models_is_beside_that_of_policies_and_people():
    policies = {"mine": {"pairs": 128} | accuracy("reward_accuracy", 0.6) | accuracy("human_ceiling", 0.9)}
    trained = {17: {"judge_pairs": 120} | accuracy("judge_accuracy", 0.7)}
    found = held_out_accuracies(policies, trained)
    assert found == {
        "reward model 17": {"rows": 120} | accuracy("accuracy", 0.7),
        "mine": {"rows": 128} | accuracy("accuracy", 0.6),
        "people": {"rows": 128} | accuracy("accuracy", 0.9),
    }
    assert held_out_accuracies(policies, {}) == {}


def test_people_are_left_out_without_agreement_and_labelled_rows_have_no_accuracy_of_a_reward_model():
    found = held_out_accuracies({"mine": {"pairs": 4} | accuracy("reward_accuracy", 0.6)}, {17: {}, 18: {}})
    assert found["reward model 17"] == found["reward model 18"] == {"rows": 0}
    assert list(found) == ["reward model 17", "reward model 18", "mine"]
