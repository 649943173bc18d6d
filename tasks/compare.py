"""Stage `compare`: all policies side by side; which one is selected, and why."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from dpo.common.files import atomic_write, write_json
from dpo.config import Params, load_params
from dpo.evaluation.pair_metrics import reliability, slices
from dpo.evaluation.selection import compare_policies, failure_signs, select
from tasks.common.paths import (
    COMPARISON,
    METRICS,
    REFERENCE,
    REPORT,
    evaluation,
    policy_folder,
    policy_margins,
    policy_samples,
    train_log,
)
from tasks.common.runner import run
from tasks.report.figures import calibration, curve, frontier, height, labels, margins
from tasks.tracking.models import log_models
from tasks.tracking.provenance import provenance
from tasks.tracking.runs import log_comparison, training_times

SHOWN_ANSWERS = 100
"""Answers of each policy in the report."""


def main() -> None:
    """Gather, test, select, draw, write."""
    params = load_params()
    trials = params.sweep.trials()
    names = labels(trials)
    policies: dict[str, dict[str, Any]] = {c.name: json.loads(evaluation(c).read_text()) for c in trials}
    pairs = {trial.name: pd.read_parquet(policy_margins(trial)) for trial in trials}
    samples = {trial.name: pd.read_parquet(policy_samples(trial)) for trial in trials}
    comparisons = compare_policies(*_outcomes(params, pairs, samples), params.seed)
    selected, reason = select(policies, comparisons, params.compare)
    signs = {key: failure_signs(metrics, params.compare) for key, metrics in policies.items()}

    up = height(policies)
    points = [
        {"policy": key, "beta": row["trial"]["beta"], "kl": row["kl"], "reward": row[up]}
        for key, row in policies.items()
    ]
    bins = _gather({key: reliability(table) for key, table in pairs.items()}, names)
    parts = _gather({key: slices(table, params.seed) for key, table in pairs.items()}, names)
    tests = pd.DataFrame([vars(c) | {"verdict": c.verdict} for c in comparisons])
    write_json(
        COMPARISON,
        {
            "selected": selected,
            "reason": reason,
            "policies": {
                key: row | {"signs": [sign.name for sign in signs[key] if sign.tripped]}
                for key, row in policies.items()
            },
        },
    )
    for name, table in {
        "frontier": pd.DataFrame(points), "calibration": bins, "slices": parts, "tests": tests
    }.items():  # fmt: skip
        with atomic_write(METRICS / f"{name}.csv") as tmp:
            table.to_csv(tmp, index=False)

    curves = _gather({trial.name: pd.read_csv(train_log(trial)) for trial in trials}, names)
    figures = [
        frontier(trials, policies),
        margins(_gather(pairs, names)),
        *([calibration(bins)] if len(bins) else []),
        *(curve(curves, name) for name in ("rewards/margins", "rewards/accuracies", "loss")),
    ]
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "report"), autoescape=True
    ).get_template("report.html.jinja")
    shown = {k: table.head(SHOWN_ANSWERS).rename(columns={"policy": "answer"}) for k, table in samples.items()}
    checkpoints = [REFERENCE, *(policy_folder(trial) for trial in trials)]
    with atomic_write(REPORT) as tmp:
        tmp.write_text(
            template.render(
                params=params,
                params_text=Path("params.yaml").read_text(),
                policies=policies,
                names=names,
                selected=selected,
                reason=reason,
                signs=signs,
                tests=tests.to_dict("records"),
                slices=parts.to_dict("records"),
                answers=_gather(shown, names).to_dict("records"),
                provenance=provenance(checkpoints) | {"training took": training_times(checkpoints)},
                plotly=get_plotlyjs(),
                figures=[
                    figure.to_html(
                        full_html=False,
                        include_plotlyjs=False,
                        config={"responsive": True, "displayModeBar": False},
                        div_id=f"figure-{number}",
                    )
                    for number, figure in enumerate(figures)
                ],
            )
        )
    log_comparison(params, policies, selected, reason, figures)
    log_models(params, [REFERENCE, *(policy_folder(trial) for trial in trials if trial.name == selected)])


def _outcomes(
    params: Params, pairs: dict[str, pd.DataFrame], samples: dict[str, pd.DataFrame]
) -> tuple[dict[str, list[float]], list[str]]:
    """What the paired test compares, judged answers or else held-out pairs, and the prompt of each."""
    column, tables = ("win", samples) if "win_rate" in params.compare.select else ("correct", pairs)
    prompts = next(iter(tables.values()))["prompt"].tolist()
    return {key: table[column].tolist() for key, table in tables.items()}, prompts


def _gather(tables: dict[str, pd.DataFrame], names: dict[str, str]) -> pd.DataFrame:
    """One table under another, with the policy's short name."""
    return pd.concat([table.assign(policy=names[key]) for key, table in tables.items()], ignore_index=True)


if __name__ == "__main__":
    run(main)
