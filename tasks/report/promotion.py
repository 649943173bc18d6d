"""What a promoted version is, as Markdown: its commit, its data, and its figures next to those it replaces."""

from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion

from tasks.common.addresses import mlflow_site, shown
from tasks.common.markdown import inline
from tasks.tracking.champions import RUN
from tasks.tracking.registry import COMMIT, PAIRS, PREDECESSOR, REGISTERED, version

FIGURES = {
    "win_rate": "win rate against the reference",
    "reward_accuracy": "reward accuracy on held-out rows",
    "margin": "margin on held-out rows",
    "kl": "KL to the reference, nats per response",
}


def describe(promoted: ModelVersion) -> str:
    """Return version, MLflow link, commit, number of training rows, and old and new figures with intervals."""
    number, tags = str(promoted.version), promoted.tags
    facts = [
        f"- version: {number} of {inline(REGISTERED)}",
        f"- policy: {inline(tags.get('trial', 'not recorded'))}",
        f"- MLflow: {_link(number)}",
        f"- commit: `{tags[COMMIT]}`",
        f"- training rows: {tags.get(PAIRS, 'not recorded')}",
    ]
    earlier = tags[PREDECESSOR]
    columns = {f"version {number}": _figures(promoted)}
    if earlier != "none":
        columns = {f"version {earlier}": _figures(version(earlier))} | columns
    rows = [
        f"| {words} | {' | '.join(_with_interval(figures, name) for figures in columns.values())} |"
        for name, words in FIGURES.items()
        if any(name in figures for figures in columns.values())
    ]
    head = [f"| figure | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    note = "Each column is relative to the reference, and on the held-out data, of that version's own retraining."
    return "\n".join([*facts, *(["", *head, *rows, "", note] if rows else [])])


def _link(number: str) -> str:
    site = shown(mlflow_site())
    return f"[version {number}]({site}/#/models/{REGISTERED}/versions/{number})" if site else f"version {number}"


def _figures(of: ModelVersion) -> dict[str, Any]:
    """Return the figures of a version, from its MLflow run; empty if the run was deleted."""
    try:
        metrics = mlflow.get_run(of.tags.get(RUN) or of.run_id).data.metrics
    except mlflow.MlflowException:
        return {}
    return {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}


def _with_interval(figures: dict[str, Any], name: str) -> str:
    if name not in figures:
        return "-"
    ends = [figures.get(f"{name}_{end}") for end in ("low", "high")]
    return f"{figures[name]:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if None not in ends else "")
