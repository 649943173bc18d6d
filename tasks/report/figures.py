"""Figures of the comparison. A policy has the same name and the same colour in all of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dpo.training.settings import Trial

REWARD_METRICS = {
    "reward": "Judged reward",
    "win_rate": "Win rate",
    "reward_accuracy": "Reward accuracy",
}  # for the reward axis; the first one that the policies have is used
CURVES = {
    "rewards/margins": ("Training: reward margin", "margin, nats"),
    "rewards/accuracies": ("Training: reward accuracy", "share of pairs"),
    "loss": ("Training: loss", "loss"),
}
"""Title and axis of each training curve, by the column of the training log."""
COLOURS = (
    "#3b82f6",
    "#e07b1a",
    "#2c9c5e",
    "#d0508f",
    "#8a68d8",
    "#a8852a",
    "#1497a8",
    "#dd5050",
    "#74893a",
    "#6f7d91",
)  # legible on white and on black
GREY = "#8a94a3"
MAX_LABELS = 6  # policies with their names beside their points; the names of more would overlap
MARGINS = {"l": 64, "r": 16, "t": 44, "b": 48}  # pixels around the axes
LEGEND = {"orientation": "h", "yanchor": "top", "y": -0.16, "x": 0, "title_text": ""}


def reward_metric(policies: Mapping[str, dict[str, Any]]) -> str:
    """Return the metric that the frontier shows as reward."""
    metrics = next(iter(policies.values()))
    return next(name for name in REWARD_METRICS if name in metrics)


def frontier(
    trials: Sequence[Trial], policies: Mapping[str, dict[str, Any]], yardsticks: pd.DataFrame, judge: str | None
) -> go.Figure:
    """Plot reward against KL, one point per policy, with 95% intervals (Rafailov et al. 2023, fig. 2).

    Lines connect policies that differ in beta only. The points of `dpo.evaluation.yardsticks.yardsticks` are lines
    too. `judge` is the name of the judge that scores the responses.
    """
    reward = reward_metric(policies)
    figure = go.Figure()
    lines = defaultdict(list)
    for trial in trials:
        lines[trial.rounds, trial.objective, trial.learning_rate, trial.seed].append(policies[trial.name])
    for rows in lines.values():
        rows.sort(key=lambda row: row["kl"])
        figure.add_scatter(
            x=[row["kl"] for row in rows], y=[row[reward] for row in rows], mode="lines",
            line={"color": GREY, "width": 1}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    start = policies[trials[0].name].get("reference_reward", 0.5)
    places = [(policies[trial.name]["kl"], policies[trial.name][reward]) for trial in trials]
    middle, labelled = max(kl for kl, _ in places) / 2, len(trials) <= MAX_LABELS
    sides = _label_sides(places, [start, *yardsticks["reward"]])
    for trial, colour, side in zip(trials, cycle(COLOURS), sides, strict=False):
        row = policies[trial.name]
        figure.add_scatter(
            x=[row["kl"]],
            y=[row[reward]],
            name=trial.name,
            text=[trial.name],
            textposition=f"{side} {'left' if row['kl'] > middle else 'right'}",  # towards the middle of the figure
            textfont_color=colour,
            mode="markers+text" if labelled else "markers",
            marker={"color": colour, "size": 9},
            error_x=_error_bars(row, "kl", colour),
            error_y=_error_bars(row, reward, colour),
            cliponaxis=False,
            showlegend=not labelled,
        )
    figure.add_scatter(
        x=[0], y=[start], text=["reference"], name="reference", mode="markers+text", textposition="top right",
        textfont_color=GREY, marker={"color": GREY, "size": 9}, cliponaxis=False, showlegend=False,
    )  # fmt: skip
    for (name, points), dash in zip(yardsticks.groupby("yardstick"), ("dot", "dash"), strict=False):
        figure.add_scatter(
            x=points["kl"], y=points["reward"], mode="lines", name=f"{name} (upper bound)",
            line={"color": GREY, "dash": dash}, showlegend=True,
        )  # fmt: skip
    axes = {"reward": f"mean score of {judge}", "win_rate": "win rate against the reference"}
    axis = axes.get(reward, "reward accuracy on held-out pairs")
    figure.update_layout(title=f"{REWARD_METRICS[reward]} against KL")
    return _styled(figure, "KL(policy ‖ reference), nats per response", axis).update_layout(
        showlegend=not labelled or bool(len(yardsticks))
    )


def _label_sides(points: Sequence[tuple[float, float]], others: Sequence[float]) -> list[str]:
    """Return for each point whether its label is at the `top` or the `bottom`, so that labels do not overlap.

    `others` are further values of the vertical axis. Labels overlap if they are nearer than 30% of the width and
    7% of the height of the figure.
    """
    values = [value for _, value in points] + list(others)
    width, height = 0.3 * max(x for x, _ in points), 0.07 * (max(values) - min(values))
    taken: list[tuple[float, float]] = []
    sides = []
    for x, y in points:
        places = {"top": (x, y + height / 2), "bottom": (x, y - height / 2)}
        free = [
            side
            for side, (left, up) in places.items()
            if all(abs(left - x2) >= width or abs(up - y2) >= height for x2, y2 in taken)
        ]
        sides.append(free[0] if free else "top")
        taken.append(places[sides[-1]])
    return sides


def _error_bars(row: dict[str, Any], name: str, colour: str) -> dict[str, Any]:
    """Return the interval as bars that are light enough to read a name across them."""
    low, high = row[f"{name}_ci"]
    light = "rgba({}, {}, {}, 0.45)".format(*px.colors.hex_to_rgb(colour))
    return {"array": [high - row[name]], "arrayminus": [row[name] - low], "thickness": 1.5, "color": light}


def _styled(figure: go.Figure, x: str, y: str) -> go.Figure:
    """Set axis titles and the common style. Margins grow so that no label is clipped."""
    figure.update_layout(
        template="plotly_white", margin=MARGINS, legend=LEGEND, title={"font_size": 15, "x": 0.01}
    )
    return figure.update_xaxes(title=x, automargin=True).update_yaxes(title=y, automargin=True)


def curve(curves: pd.DataFrame, name: str) -> go.Figure:
    """Plot one training metric by step, with one line per policy."""
    title, axis = CURVES[name]
    lines = px.line(curves, x="step", y=name, color="policy", title=title, color_discrete_sequence=COLOURS)
    return _styled(lines, "optimizer step", axis)


def margins(pairs: pd.DataFrame) -> go.Figure:
    """Plot the distribution of the margins of the held-out pairs."""
    bars = px.histogram(
        pairs, x="margin", color="policy", barmode="overlay", nbins=40, title="Reward margin of held-out pairs",
        color_discrete_sequence=COLOURS,
    )  # fmt: skip
    return _styled(bars, "margin, nats", "pairs").add_vline(x=0, line_dash="dot", line_color=GREY)


def calibration(bins: pd.DataFrame) -> go.Figure:
    """Plot agreement with people by the policy's confidence. A calibrated policy is on the diagonal."""
    lines = px.line(
        bins, x="confidence", y="agreement", color="policy", markers=True, hover_data=["pairs"],
        title="Calibration: agreement with people", color_discrete_sequence=COLOURS,
    )  # fmt: skip
    lines.add_shape(type="line", x0=0.5, y0=0.5, x1=1, y1=1, line={"dash": "dot", "color": GREY})
    return _styled(lines, "confidence, sigmoid(|margin|)", "share of people who agree")
