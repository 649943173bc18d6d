"""The figures of the comparison."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dpo.training.settings import Trial

HEIGHTS = {
    "reward": "judge's score of the policy's answers",
    "win_rate": "win rate against the reference",
    "reward_accuracy": "reward accuracy",
}
"""What reward is, the first that there is."""


def labels(trials: Sequence[Trial], *, beta: bool = True) -> dict[str, str]:
    """Return a short name for each trial: its beta, if wanted, and whatever else differs within the sweep."""
    varies = {
        name: len({getattr(trial, name) for trial in trials}) > 1 for name in ("loss", "learning_rate", "seed")
    }
    return {
        trial.name: ", ".join(
            [trial.loss] * varies["loss"]
            + [f"β {trial.beta:g}"] * beta
            + [f"lr {trial.learning_rate:g}"] * varies["learning_rate"]
            + [f"seed {trial.seed}"] * varies["seed"]
        )
        for trial in trials
    }


def height(policies: Mapping[str, dict[str, Any]]) -> str:
    """The figure that the frontier shows as reward."""
    metrics = next(iter(policies.values()))
    return next(name for name in HEIGHTS if name in metrics)


def frontier(trials: Sequence[Trial], policies: Mapping[str, dict[str, Any]]) -> go.Figure:
    """Reward against KL to the reference with 95% intervals (Rafailov et al. 2023, fig. 2).

    One line for each loss (and learning rate and seed, where there are several), one point for each beta.
    """
    up = height(policies)
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
            y=[row[up] for row in rows],
            text=[f"β {trial.beta:g}" for trial in members],
            textposition="bottom right",
            mode="lines+markers+text",
            error_x=_bars(rows, "kl"),
            error_y=_bars(rows, up),
            name=line,
        )
    start = next(iter(policies.values())).get("reference_reward", 0.5)
    figure.add_scatter(
        x=[0], y=[start], text=["reference"], mode="markers+text", textposition="bottom right", name="reference"
    )
    return figure.update_layout(
        title="Reward against KL to the reference",
        xaxis_title="KL(π ‖ π_ref), nats per answer",
        yaxis_title=HEIGHTS[up],
        template="plotly_white",
        showlegend=len(lines) > 1,
    )


def _bars(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    low, high = zip(*(row[f"{name}_ci"] for row in rows), strict=True)
    values = [row[name] for row in rows]
    return {
        "array": [h - v for h, v in zip(high, values, strict=True)],
        "arrayminus": [v - w for v, w in zip(values, low, strict=True)],
    }


def curve(curves: pd.DataFrame, name: str) -> go.Figure:
    """One training metric by step, one line a policy."""
    figure = px.line(curves, x="step", y=name, color="policy", title=f"Training: {name}", template="plotly_white")
    return figure.update_layout(legend_title="")


def margins(pairs: pd.DataFrame) -> go.Figure:
    """How the margins of the held-out pairs are spread."""
    figure = px.histogram(
        pairs, x="margin", color="policy", barmode="overlay", nbins=40,
        title="Margins of the held-out pairs", template="plotly_white",
    )  # fmt: skip
    return figure.update_layout(legend_title="", yaxis_title="pairs").add_vline(x=0, line_dash="dot")


def calibration(bins: pd.DataFrame) -> go.Figure:
    """How often people agree with a policy that is as sure as this; on the diagonal it is calibrated."""
    figure = px.line(
        bins, x="confidence", y="agreement", color="policy", markers=True, hover_data=["pairs"],
        title="Calibration of sigmoid(margin)", template="plotly_white",
    )  # fmt: skip
    figure.add_shape(type="line", x0=0.5, y0=0.5, x1=1, y1=1, line={"dash": "dot", "color": "#888"})
    return figure.update_layout(legend_title="", yaxis_title="share of people who agree")
