"""Figures contain the numbers that they are drawn from."""

import pandas as pd
import pytest

from dpo.evaluation.yardsticks import yardsticks
from dpo.training.losses import LOSSES
from dpo.training.settings import Trial
from tasks.report.comparison import verified_metrics
from tasks.report.figures import MAX_LABELS, calibration, curve, frontier, margins, reward_metric

NO_POINTS = yardsticks([], [])


def trial(loss="sigmoid", beta=0.1, learning_rate=5e-5, seed=17):
    return Trial(loss=LOSSES[loss](), beta=beta, learning_rate=learning_rate, seed=seed)


def metrics(kl, reward):
    return {"kl": kl, "kl_ci": [kl - 1, kl + 2], "reward": reward, "reward_ci": [reward - 0.1, reward + 0.3],
            "reference_reward": 0.05, "win_rate": 0.5, "win_rate_ci": [0.4, 0.6]}  # fmt: skip


def test_frontier_has_a_named_point_with_error_bars_per_policy_and_a_line_per_loss():
    trials = [trial(loss, beta) for loss in ("sigmoid", "ipo") for beta in (0.5, 0.1)]
    policies = {each.name: metrics(kl=1 / each.beta, reward=each.beta) for each in trials}
    figure = frontier(trials, policies, NO_POINTS, "my_scorer")
    points = {trace.name: trace for trace in figure.data if trace.name}
    assert list(points) == [*policies, "reference"]
    for each in trials:
        point = points[each.name]
        assert (point.x, point.y, point.text) == ((1 / each.beta,), (each.beta,), (each.name,))
        assert point.error_y.array == pytest.approx((0.3,))
        assert point.error_x.arrayminus == pytest.approx((1,))
    assert len({points[name].marker.color for name in policies}) == 4, "each policy has a colour of its own"
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert [(line.x, line.y) for line in lines] == [((2.0, 10.0), (0.5, 0.1))] * 2
    assert (points["reference"].x, points["reference"].y) == ((0,), (0.05,))
    assert figure.layout.yaxis.title.text == "mean score of my_scorer"
    assert figure.layout.title.text == "Judged reward against KL"


def test_names_of_near_points_do_not_overlap():
    rows = {0.05: (6.0, 0.55), 0.1: (5.8, 0.54), 0.5: (3.7, 0.37), 1.0: (0.5, 0.2)}
    trials = [trial(beta=beta) for beta in rows]
    policies = {each.name: metrics(*rows[each.beta]) for each in trials}
    points = {trace.name: trace for trace in frontier(trials, policies, NO_POINTS, "s").data if trace.name}
    positions = [points[name].textposition for name in policies]
    assert positions == ["top left", "bottom left", "top left", "top right"]


def test_names_of_many_policies_are_in_the_legend():
    trials = [trial(beta=beta / 10) for beta in range(1, MAX_LABELS + 2)]
    policies = {each.name: metrics(kl=1 / each.beta, reward=each.beta) for each in trials}
    points = [trace for trace in frontier(trials, policies, NO_POINTS, "s").data if trace.name in policies]
    assert all(point.mode == "markers" and point.showlegend for point in points)


def test_frontier_has_a_dotted_line_per_yardstick():
    scores = [i / 96 for i in range(96)]
    figure = frontier(
        [trial()], {trial().name: metrics(kl=2, reward=0.6)}, yardsticks(scores, ["prompt"] * 96), "s"
    )
    dotted = {trace.name: trace for trace in figure.data if trace.line.dash in ("dot", "dash")}
    assert list(dotted) == ["best-of-n (upper bound)", "optimum (upper bound)"]
    assert dotted["best-of-n (upper bound)"].y[0] == pytest.approx(
        2 / 3, abs=0.01
    )  # the larger of two uniform numbers
    assert figure.layout.showlegend


def test_frontier_shows_the_win_rate_if_there_are_no_scores():
    policies = {trial().name: {k: v for k, v in metrics(3, 1).items() if "reward" not in k}}
    assert reward_metric(policies) == "win_rate"
    figure = frontier([trial()], policies, NO_POINTS, "s")
    assert {trace.name: trace.y for trace in figure.data if trace.name} == {
        trial().name: (0.5,),
        "reference": (0.5,),
    }
    assert figure.layout.yaxis.title.text == "win rate against the reference"


def test_curves_margins_and_calibration_have_a_line_per_policy():
    table = pd.DataFrame({"policy": ["a", "a", "b"], "step": [1, 2, 1], "loss": [3.0, 2.0, 1.0],
                          "margin": [0.1, 0.2, 0.3], "confidence": [0.6, 0.9, 0.7],
                          "agreement": [0.5, 0.8, 0.7], "pairs": [1, 2, 3]})  # fmt: skip
    for figure in (curve(table, "loss"), margins(table), calibration(table)):
        assert [trace.name for trace in figure.data] == ["a", "b"]
    assert list(curve(table, "loss").data[0].y) == [3.0, 2.0]
    assert list(calibration(table).data[0].x) == [0.6, 0.9]


def test_verified_answers_are_shown_if_there_is_a_verifier():
    metrics = {"pass_at_1": 0.2, "pass_at_1_ci": [0.1, 0.3], "pass_at_4": 0.5, "without_pair": 0.4}
    assert list(verified_metrics({"a": metrics | {"entropy_per_token": 0.1}}).values()) == [
        *("pass@1", "pass@4", "problems without a pair", "entropy, nats per token"),
    ]
    assert verified_metrics({"a": {"entropy_per_token": 0.1, "win_rate": 0.5}}) == {}
