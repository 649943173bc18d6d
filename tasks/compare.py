"""Stage `compare`: all betas side by side, as figures, as a table and as a report."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from dpo.config import load_params
from dpo.files import write_json, written_whole
from tasks.stage import COMPARISON, METRICS, REPORT, evaluation, policy_samples, run, train_log
from tasks.tracking import log_comparison

SHOWN_SAMPLES = 24


def main() -> None:
    """Gather, draw, write."""
    params = load_params()
    betas = [str(beta) for beta in params.dpo.betas]
    rows = [json.loads(evaluation(beta).read_text()) for beta in tqdm(betas, desc="comparing", unit="policy")]
    curves = pd.concat([pd.read_csv(train_log(beta)).assign(beta=beta) for beta in betas])
    samples = pd.concat(
        [pd.read_parquet(policy_samples(beta)).head(SHOWN_SAMPLES).assign(beta=beta) for beta in betas]
    )
    figures = [
        frontier(rows),
        *(curve(curves, name) for name in ("rewards/margins", "rewards/accuracies", "loss")),
    ]

    write_json(COMPARISON, dict(zip(betas, rows, strict=True)))
    with written_whole(METRICS / "frontier.csv") as aside:
        height = "reward" if "reward" in rows[0] else "reward_accuracy"
        pd.DataFrame([{"beta": r["beta"], "kl": r["kl"], "reward": r[height]} for r in rows]).to_csv(
            aside, index=False
        )
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template(
        "report.html.jinja"
    )
    with written_whole(REPORT) as aside:
        aside.write_text(
            template.render(
                rows=rows,
                figures=[
                    figure.to_html(
                        full_html=False,
                        include_plotlyjs=False,
                        config={"responsive": True},
                        div_id=f"figure-{number}",
                    )
                    for number, figure in enumerate(figures)
                ],
                plotly=get_plotlyjs(),
                samples=samples.to_dict("records"),
                judge=params.evaluate.judge,
                max_displacement=params.compare.max_displacement,
            )
        )
    log_comparison(params, rows, [REPORT, COMPARISON])


def frontier(rows: list[dict[str, Any]]) -> go.Figure:
    """Reward against KL to the reference, one point a beta, with 95% intervals (Rafailov et al. 2023, fig. 2)."""
    height = "reward" if "reward" in rows[0] else "reward_accuracy"
    rows = sorted(rows, key=lambda row: row["kl"])
    figure = go.Figure(
        go.Scatter(
            x=[row["kl"] for row in rows],
            y=[row[height] for row in rows],
            text=[f"β = {row['beta']:g}" for row in rows],
            textposition="bottom right",
            mode="lines+markers+text",
            error_x=_bars(rows, "kl"),
            error_y=_bars(rows, height),
            name="policies",
        )
    )
    if "reference_reward" in rows[0]:
        figure.add_scatter(
            x=[0], y=[rows[0]["reference_reward"]], text=["reference"], mode="markers+text",
            textposition="bottom right", name="reference",
        )  # fmt: skip
    return figure.update_layout(
        title="Reward against KL to the reference",
        xaxis_title="KL(π ‖ π_ref), nats per answer",
        yaxis_title="judge's score of the policy's answers" if height == "reward" else "reward accuracy",
        template="plotly_white",
        showlegend=False,
    )


def _bars(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    low, high = zip(*(row[f"{name}_ci"] for row in rows), strict=True)
    values = [row[name] for row in rows]
    return {
        "array": [h - v for h, v in zip(high, values, strict=True)],
        "arrayminus": [v - w for v, w in zip(values, low, strict=True)],
    }


def curve(curves: pd.DataFrame, name: str) -> go.Figure:
    """One training metric by step, one line a beta."""
    figure = px.line(curves, x="step", y=name, color="beta", title=f"Training: {name}", template="plotly_white")
    return figure.update_layout(legend_title="beta")


if __name__ == "__main__":
    run(main)
