"""Figures of the comparison."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dpo.training.settings import Trial

REWARD_METRICS = {
    "reward": "judge's score of the policy's responses",
    "win_rate": "win rate against the reference",
    "reward_accuracy": "reward accuracy",
}  # for the reward axis; the first one that the policies have is used


def labels(trials: Sequence[Trial], *, beta: bool = True) -> dict[str, str]:
    """Return a short name for each trial: its beta, if requested, and every setting that varies in the sweep."""
    names = ("loss", "learning_rate", "seed", "rounds")
    varies = {name: len({getattr(trial, name) for trial in trials}) > 1 for name in names}
    return {
        trial.name: ", ".join(
            [f"{trial.rounds or 'no'} rounds"] * varies["rounds"]
            + [trial.loss.name] * varies["loss"]
            + [f"β {trial.beta:g}"] * beta
            + [f"lr {trial.learning_rate:g}"] * varies["learning_rate"]
            + [f"seed {trial.seed}"] * varies["seed"]
        )
        for trial in trials
    }


def reward_metric(policies: Mapping[str, dict[str, Any]]) -> str:
    """Return the metric that the frontier shows as reward."""
    metrics = next(iter(policies.values()))
    return next(name for name in REWARD_METRICS if name in metrics)


def frontier(
    trials: Sequence[Trial], policies: Mapping[str, dict[str, Any]], yardsticks: pd.DataFrame
) -> go.Figure:
    """Plot reward against KL, one point per beta, with 95% intervals (Rafailov et al. 2023, fig. 2).

    The points of `dpo.evaluation.yardsticks.yardsticks` are dotted lines.
    """
    reward = reward_metric(policies)
    figure = go.Figure()
    lines = defaultdict(list)
    names = labels(trials, beta=False)
    for trial in trials:
        lines[names[trial.name] or "policies"].append(trial)
    for line, members in lines.items():
        members.sort(key=lambda trial: policies[trial.name]["kl"])
        rows = [policies[trial.name] for trial in members]
        figure.add_scatter(
            x=[row["kl"] for row in rows],
            y=[row[reward] for row in rows],
            text=[f"β {trial.beta:g}" for trial in members],
            textposition="bottom right",
            mode="lines+markers+text",
            error_x=_error_bars(rows, "kl"),
            error_y=_error_bars(rows, reward),
            name=line,
        )
    start = policies[trials[0].name].get("reference_reward", 0.5)
    figure.add_scatter(
        x=[0], y=[start], text=["reference"], mode="markers+text", textposition="bottom right", name="reference"
    )
    for name, points in yardsticks.groupby("yardstick"):
        figure.add_scatter(x=points["kl"], y=points["reward"], mode="lines", line_dash="dot", name=name)
    return figure.update_layout(
        title="Reward against KL to the reference",
        xaxis_title="KL(π ‖ π_ref), nats per response",
        yaxis_title=REWARD_METRICS[reward],
        template="plotly_white",
        showlegend=len(figure.data) > 2,
    )


def _error_bars(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return {
        "array": [row[f"{name}_ci"][1] - row[name] for row in rows],
        "arrayminus": [row[name] - row[f"{name}_ci"][0] for row in rows],
    }


def curve(curves: pd.DataFrame, name: str) -> go.Figure:
    """Plot one training metric by step, with one line per policy."""
    figure = px.line(curves, x="step", y=name, color="policy", title=f"Training: {name}", template="plotly_white")
    return figure.update_layout(legend_title="")


def margins(pairs: pd.DataFrame) -> go.Figure:
    """Plot the distribution of the margins of the held-out pairs."""
    figure = px.histogram(
        pairs, x="margin", color="policy", barmode="overlay", nbins=40,
        title="Margins of the held-out pairs", template="plotly_white",
    )  # fmt: skip
    return figure.update_layout(legend_title="", yaxis_title="pairs").add_vline(x=0, line_dash="dot")


def calibration(bins: pd.DataFrame) -> go.Figure:
    """Plot agreement with people by the policy's confidence. A calibrated policy is on the diagonal."""
    figure = px.line(
        bins, x="confidence", y="agreement", color="policy", markers=True, hover_data=["pairs"],
        title="Calibration of sigmoid(margin)", template="plotly_white",
    )  # fmt: skip
    figure.add_shape(type="line", x0=0.5, y0=0.5, x1=1, y1=1, line={"dash": "dot", "color": "#888"})
    return figure.update_layout(legend_title="", yaxis_title="share of people who agree")
