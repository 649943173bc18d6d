"""The comparison of all policies as a page for the browser."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from dpo.common.bundled import MODEL_NAME
from dpo.common.files import atomic_write
from dpo.config import Params
from dpo.evaluation.selection import FailureMode, Selection
from dpo.evaluation.yardsticks import kl_at
from dpo.training.settings import Trial
from tasks.common.markdown import inline
from tasks.common.paths import FRONTIER_LINK, REFERENCE, REPORT, policy_folder
from tasks.report.figures import CURVES, calibration, curve, frontier, margins
from tasks.report.responses import Conversation, extremes, shown_responses
from tasks.tracking.provenance import provenance

FIGURE_CONFIG = {"responsive": True, "displayModeBar": False}
LARGE, BESIDE = 1, 2
"""Figures with room for a legend, and the next ones, beside the first. A policy's colour is in the table too."""


@dataclass(frozen=True)
class Results:
    """Results of all trials. The dicts have the trials' names as keys, the tables the column `policy`."""

    trials: list[Trial]
    policies: dict[str, dict[str, Any]]  # metrics
    selection: Selection
    failure_modes: dict[str, list[FailureMode]]
    tests: pd.DataFrame  # of all policies and the reference
    samples: dict[str, pd.DataFrame]
    conversations: list[Conversation]  # the turns of the prompt of each row of the samples
    costs: dict[str, dict[str, Any]]  # of the reference and the policies
    reward_models: dict[int, dict[str, Any]]  # accuracy on held-out pairs, by seed
    yardsticks: pd.DataFrame  # points of best-of-n and of the optimum
    replies: dict[str, list[Any]]  # of paid judges
    pairs: pd.DataFrame
    train_logs: pd.DataFrame
    calibration: pd.DataFrame
    slices: pd.DataFrame  # of held-out pairs
    wins: pd.DataFrame  # by source and length of the responses; empty without a judge


def concatenate(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Concatenate tables and add the policy's name as the column `policy`."""
    return pd.concat([table.assign(policy=name) for name, table in tables.items()], ignore_index=True)


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


def draw_figures(params: Params, results: Results) -> list[go.Figure]:
    """Return the figures of the page, the frontier first. Calibration needs pairs with agreement."""
    judges = params.evaluate.judges
    return [
        frontier(results.trials, results.policies, results.yardsticks, judges[0].name if judges else None),
        margins(results.pairs),
        *(curve(results.train_logs, name) for name in CURVES if name in results.train_logs),
        *([calibration(results.calibration)] if len(results.calibration) else []),
    ]


def metric_titles(params: Params, policies: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the titles of the columns of the main table, by metric; those that no policy has are left out."""
    judges = [judge.name for judge in params.evaluate.judges]
    titles = {
        "win_rate": "win rate against the reference",
        **{f"win_rate/{judge}": f"win rate by {judge}" for judge in judges[1:]},
        "base_win_rate": "win rate against the base model",
        "length_controlled_win_rate": "length-controlled win rate",
        "judged_gain": "judged gain",
        "kl": "KL, nats per response",
        "reward_accuracy": "reward accuracy",
        "margin": "margin, nats",
        "perplexity": "perplexity of held-out completions",
    }
    return {name: title for name, title in titles.items() if any(name in row for row in policies.values())}


def compared_with(first: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of the main table for the reference and the base model, from the metrics of any policy."""
    rows: dict[str, dict[str, Any]] = {"reference": _renamed(first, "reference_perplexity", "perplexity")}
    rows["reference"] |= _renamed(first, "reference_base_win_rate", "base_win_rate")
    if "base_perplexity" in first:
        rows["base model"] = _renamed(first, "base_perplexity", "perplexity")
    if "reference_base_win_rate" in first:
        low, high = first["reference_base_win_rate_ci"]
        won = {"win_rate": 1 - first["reference_base_win_rate"], "win_rate_ci": [1 - high, 1 - low]}
        rows["base model"] |= won
    return rows


def held_out_accuracies(
    policies: dict[str, dict[str, Any]], reward_models: dict[int, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return `rows` and `accuracy` of reward models, policies and people, empty without a reward model.

    The accuracy of people is the human ceiling, if the data has agreement. A policy prefers a completion by DPO's
    implicit reward.
    """
    if not reward_models:
        return {}
    found = {
        f"reward model {seed}": {"rows": row.get("judge_pairs", 0)} | _renamed(row, "judge_accuracy", "accuracy")
        for seed, row in reward_models.items()
    }
    for name, row in policies.items():
        found[name] = {"rows": row["pairs"]} | _renamed(row, "reward_accuracy", "accuracy")
    first = next(iter(policies.values()))
    if "human_ceiling" in first:
        found["people"] = {"rows": first["pairs"]} | _renamed(first, "human_ceiling", "accuracy")
    return found


def _renamed(row: dict[str, Any], name: str, new: str) -> dict[str, Any]:
    return {new: row[name], f"{new}_ci": row[f"{name}_ci"]} if name in row else {}


def write_report(params: Params, results: Results, figures: list[go.Figure], frontier: str | None = None) -> None:
    """Write the page. Its text is escaped, and it needs no network. `frontier` is a page of MLflow's UI."""
    from tasks.tracking.runs import run_pages, training_times  # after the comparison: MLflow starts slowly

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    names = [trial.name for trial in results.trials]
    environment.filters["names"] = lambda text: with_names(text, names)
    checkpoints = [REFERENCE, *(policy_folder(trial) for trial in results.trials)]
    facts = provenance(checkpoints)
    page = environment.get_template("report.html.jinja").render(
        params=params,
        params_text=Path("params.yaml").read_text(),
        facts={
            "Model": MODEL_NAME if params.model.base == "default" else params.model.base,
            "Data": params.data.origin,
            "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "Commit": facts["code"]["git commit"],
        },
        results=results,
        judges=[judge.name for judge in params.evaluate.judges],
        kl_of_optimum={
            name: kl_at(row.get("reward"), results.yardsticks) for name, row in results.policies.items()
        },
        titles=metric_titles(params, results.policies),
        others=compared_with(next(iter(results.policies.values()))),
        accuracies=held_out_accuracies(results.policies, results.reward_models),
        verified=verified_metrics(results.policies),
        colours={trace.name: trace.marker.color for trace in figures[0].data if trace.name in names},
        pages=run_pages(params, checkpoints) | {"frontier": frontier},
        extremes=extremes(results.samples, results.conversations, results.selection.name),
        responses=shown_responses(results.samples, results.conversations),
        provenance=facts | {"training took": training_times(checkpoints)},
        plotly=get_plotlyjs(),
        figures=[
            go.Figure(figure)
            .update_layout({} if number < LARGE else {"showlegend": False})
            .to_html(FIGURE_CONFIG, full_html=False, include_plotlyjs=False, div_id=f"figure-{number}")
            for number, figure in enumerate(figures)
        ],
        beside=LARGE + BESIDE,
    )
    with atomic_write(REPORT) as tmp:
        tmp.write_text(page)


def with_names(text: str, names: list[str]) -> Markup:
    """Return escaped text in which the names of policies are marked, so that the browser does not break them."""
    pattern = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    parts = re.split(f"({pattern})", text)
    marked = [Markup("<code>{}</code>").format(part) if part in names else escape(part) for part in parts]
    return Markup("").join(marked)


def selection_page(results: Results, metric: str, frontier: str | None = None) -> str:
    """Return the selected policy, the reason, and the deciding metric of all policies as Markdown for Prefect.

    The last line is a link to `frontier`, a page of MLflow's UI, if there is one.
    """
    lines = [
        f"**Selected:** {inline(results.selection.name or 'no policy')}",
        "",
        inline(results.selection.reason),
    ]
    lines += ["", f"| policy | {inline(metric.replace('_', ' '))} | KL | detected failure modes |"]
    lines.append("| --- | ---: | ---: | --- |")
    for name, figures in results.policies.items():
        modes = sorted({mode.name for mode in results.failure_modes[name] if mode.detected})
        shown = f"{figures[metric]:.3f}" if metric in figures else "-"
        if ends := figures.get(f"{metric}_ci"):
            shown += f" [{ends[0]:.3f}, {ends[1]:.3f}]"
        lines.append(f"| {inline(name)} | {shown} | {figures['kl']:.3f} | {', '.join(modes) or 'none'} |")
    lines += ["", f"[{FRONTIER_LINK}]({frontier})"] if frontier else []
    return "\n".join([*lines, ""])
