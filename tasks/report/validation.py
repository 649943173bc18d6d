"""The validation report: a table for the terminal, Markdown for Prefect and a page for the browser."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from dpo.common.files import atomic_write
from dpo.config import Params
from dpo.data.rules import RULES
from dpo.data.validate import Validated

SHOWN_RULES, SHOWN_NOTICES = 10, 4


def broken_rules(result: Validated, params: Params) -> list[tuple[str, int, str]]:
    """Each broken rule with its count and what a breach of it does, the most frequent first."""
    rows = [
        (rule, count, getattr(params.validate.rules, rule, "error"))
        for rule, count in result.metrics["rules"].items()
        if count
    ]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def table(result: Validated, params: Params, page: Path) -> str:
    """What a terminal shows, at most 20 lines."""
    metrics, broken = result.metrics, broken_rules(result, params)
    lines = [_summary(metrics)]
    if broken:
        lines.append(f"{'rule':24}{'rows':>9}  {'setting':12}first at")
    for rule, count, action in broken[:SHOWN_RULES]:
        first = result.examples.get(rule, [None])[0]
        place = f"{first['file']}:{first['line']}" if first else "-"
        lines.append(f"{rule:24}{count:9}  {action:12}{place}")
    if len(broken) > SHOWN_RULES:
        lines.append(f"and {len(broken) - SHOWN_RULES} more rules, see the report")
    lines += [f"{rule}: {reason}" for rule, reason in result.notices[:SHOWN_NOTICES]]
    if "lengths" in metrics:
        lengths = [f"{k} {v['median']:g} / {v['p99']:g} / {v['max']:g}" for k, v in metrics["lengths"].items()]
        lines.append(f"{metrics['unit']}, median / 99th percentile / most: {', '.join(lengths)}")
    return "\n".join([*lines, f"report: {page}"])


def _summary(metrics: dict[str, Any]) -> str:
    splits = [f"{split} {metrics[split]['pairs']} ({metrics[split]['used']} used)" for split in ("train", "eval")]
    counts = f"{metrics['rows']} rows: {metrics['accepted']} sound, {metrics['quarantined']} set aside"
    return f"{counts}; {', '.join(splits)}"


def markdown(result: Validated, params: Params) -> str:
    """The same for people who read the flow's page."""
    rows = [
        f"| {rule} | {count} | {action} | {RULES[rule].means} | {RULES[rule].mend} |"
        for rule, count, action in broken_rules(result, params)
    ]
    head = ["| rule | rows | setting | what holds | what to do |", "| --- | ---: | --- | --- | --- |"]
    listed = [*head, *rows] if rows else ["No rule is broken."]
    faults = [f"- **{error}**" for error in result.errors]
    return "\n".join(["## Preference data", "", f"{_summary(result.metrics)}.", "", *faults, "", *listed, ""])


def write_report(result: Validated, params: Params, path: Path) -> None:
    """The page for a browser; all text of the data is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("validation.html.jinja").render(
        result=result,
        metrics=result.metrics,
        broken=broken_rules(result, params),
        rules=RULES,
        params=params.validate,
    )
    with atomic_write(path) as tmp:
        tmp.write_text(page)
