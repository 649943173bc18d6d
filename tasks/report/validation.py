"""The validation report: a table for the terminal, Markdown for Prefect and an HTML page."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from dpo.common.files import atomic_write
from dpo.config import Params
from dpo.data.rules import RULES
from dpo.data.validate import Validated

SHOWN_RULES, SHOWN_NOTICES = 10, 4


def broken_rules(result: Validated, params: Params) -> list[tuple[str, int, str]]:
    """Return each broken rule with the number of violations and its action, the most frequent first."""
    actions = params.validate.actions
    rows = [(rule, count, actions[rule]) for rule, count in result.metrics["rules"].items() if count]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def table(result: Validated, params: Params, page: Path) -> str:
    """Return the table for a terminal, at most 20 lines."""
    metrics, broken = result.metrics, broken_rules(result, params)
    lines = [_counts(metrics)]
    if broken:
        lines.append(f"{'rule':24}{'rows':>9}  {'action':12}first violation")
    for rule, count, action in broken[:SHOWN_RULES]:
        first = result.examples.get(rule, [None])[0]
        where = f"{first['file']}:{first['line']}" if first else "-"
        lines.append(f"{rule:24}{count:9}  {action:12}{where}")
    if len(broken) > SHOWN_RULES:
        lines.append(f"and {len(broken) - SHOWN_RULES} more rules, see the report")
    lines += [f"{rule}: {reason}" for rule, reason in result.summary.notices[:SHOWN_NOTICES]]
    if "lengths" in metrics:
        lengths = [f"{k} {v['median']:g} / {v['p99']:g} / {v['max']:g}" for k, v in metrics["lengths"].items()]
        lines.append(f"{metrics['unit']}, median / 99th percentile / maximum: {', '.join(lengths)}")
    return "\n".join([*lines, f"report: {page}"])


def _counts(metrics: dict[str, Any]) -> str:
    splits = [f"{split} {metrics[split]['pairs']} ({metrics[split]['used']} used)" for split in ("train", "eval")]
    counts = f"{metrics['rows']} rows: {metrics['accepted']} accepted, {metrics['quarantined']} quarantined"
    return f"{counts}; {', '.join(splits)}"


def markdown(result: Validated, params: Params) -> str:
    """Return the broken rules as Markdown for the page of the flow run."""
    rows = [
        f"| {rule} | {count} | {action} | {RULES[rule].meaning} | {RULES[rule].fix} |"
        for rule, count, action in broken_rules(result, params)
    ]
    head = ["| rule | rows | action | requirement | fix |", "| --- | ---: | --- | --- | --- |"]
    listed = [*head, *rows] if rows else ["No rule is broken."]
    errors = [f"- **{error.message}**" for error in result.errors]
    return "\n".join(["## Preference data", "", f"{_counts(result.metrics)}.", "", *errors, "", *listed, ""])


def write_report(result: Validated, params: Params, path: Path) -> None:
    """Write the report as an HTML page. All text of the data is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    template = environment.get_template("validation.html.jinja")
    values = {"broken": broken_rules(result, params), "rules": RULES, "params": params.validate}
    with atomic_write(path) as tmp:
        tmp.write_text(template.render(result=result, **vars(result), **values))
