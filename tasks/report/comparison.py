"""The comparison of all policies as a page for the browser."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from dpo.common.files import atomic_write
from dpo.config import Params
from dpo.evaluation.selection import FailureMode, Selection
from dpo.evaluation.yardsticks import kl_at
from dpo.training.settings import Trial
from tasks.common.paths import REFERENCE, REPORT, policy_folder
from tasks.report.figures import calibration, curve, frontier, margins
from tasks.tracking.provenance import provenance

MAX_RESPONSES = 100  # of each policy on the page
FIGURE_CONFIG = {"responsive": True, "displayModeBar": False}


@dataclass(frozen=True)
class Results:
    """Results of all trials. The dicts have the trials' names as keys."""

    trials: list[Trial]
    names: dict[str, str]  # short names for figures and tables
    policies: dict[str, dict[str, Any]]  # metrics
    selection: Selection
    failure_modes: dict[str, list[FailureMode]]
    tests: pd.DataFrame  # of all policies and the reference
    samples: dict[str, pd.DataFrame]
    yardsticks: pd.DataFrame  # points of best-of-n and of the optimum
    pairs: pd.DataFrame  # of all trials, with the short name in the column `policy`, as the next three tables
    train_logs: pd.DataFrame
    calibration: pd.DataFrame
    slices: pd.DataFrame


def concatenate(tables: dict[str, pd.DataFrame], names: dict[str, str]) -> pd.DataFrame:
    """Concatenate tables and add the policy's short name as the column `policy`."""
    return pd.concat([table.assign(policy=names[key]) for key, table in tables.items()], ignore_index=True)


def verified_metrics(policies: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return titles of the metrics of verified answers that the policies have, empty without a verifier."""
    metrics = next(iter(policies.values()))
    shown = {name: f"pass@{name.rpartition('_')[2]}" for name in metrics if re.fullmatch(r"pass_at_\d+", name)}
    if not shown:
        return {}
    others = (
        ("without_pair", "problems without a pair"),
        ("entropy_per_token", "entropy, nats per token"),
        ("right_work", "right work"),
        ("right_answer_wrong_work", "right answers with wrong work"),
    )
    return shown | {name: title for name, title in others if name in metrics}


def draw_figures(results: Results) -> list[go.Figure]:
    """Return the figures of the page. Calibration needs pairs with agreement."""
    return [
        frontier(results.trials, results.policies, results.yardsticks),
        margins(results.pairs),
        *([calibration(results.calibration)] if len(results.calibration) else []),
        *(curve(results.train_logs, name) for name in ("rewards/margins", "rewards/accuracies", "loss")),
    ]


def write_report(params: Params, results: Results, figures: list[go.Figure]) -> None:
    """Write the page. Its text is escaped, and it needs no network."""
    from tasks.tracking.runs import training_times  # after the comparison: MLflow starts slowly

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    checkpoints = [REFERENCE, *(policy_folder(trial) for trial in results.trials)]
    samples = {name: table.head(MAX_RESPONSES) for name, table in results.samples.items()}
    judges = [judge.name for judge in params.evaluate.judges]
    page = environment.get_template("report.html.jinja").render(
        params=params,
        params_text=Path("params.yaml").read_text(),
        results=results,
        judges=judges,
        kl_of_optimum={
            name: kl_at(row.get("reward"), results.yardsticks) for name, row in results.policies.items()
        },
        metrics={
            "win_rate": "win rate",
            **{f"win_rate/{judge}": f"win rate by {judge}" for judge in judges[1:]},
            "length_controlled_win_rate": "length-controlled win rate",
            "tie_rate": "tie rate",
            "judged_gain": "judged gain",
            "kl": "KL, nats per response",
            "reward_accuracy": "reward accuracy",
            "margin": "margin",
        },
        verified=verified_metrics(results.policies),
        tests=results.tests.to_dict("records"),
        slices=results.slices.to_dict("records"),
        responses=concatenate(samples, results.names).to_dict("records"),
        provenance=provenance(checkpoints) | {"training took": training_times(checkpoints)},
        plotly=get_plotlyjs(),
        figures=[
            figure.to_html(FIGURE_CONFIG, full_html=False, include_plotlyjs=False, div_id=f"figure-{number}")
            for number, figure in enumerate(figures)
        ],
    )
    with atomic_write(REPORT) as tmp:
        tmp.write_text(page)
