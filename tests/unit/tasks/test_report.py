"""The report's page: names of policies, and the order of the responses."""

import pandas as pd
import pytest

from tasks.report.comparison import with_names
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
