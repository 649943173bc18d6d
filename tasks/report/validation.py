"""The validation report: a table for the terminal, Markdown for Prefect and an HTML page."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from dpo.common.files import atomic_write
from dpo.config import Params
from dpo.data.rules import RULES, TOKENIZER_RULES
from dpo.data.validate import Validated
from tasks.common.markdown import inline

SHOWN_RULES, SHOWN_NOTICES, SHOWN_FILES, SHOWN_FIELDS = 10, 4, 4, 8
SHOWN_REASON = 90  # characters


def broken_rules(result: Validated, params: Params) -> list[tuple[str, int, str]]:
    """Return each broken rule with the number of violations and its action, the most frequent first."""
    actions = params.validate.actions
    rows = [(rule, count, actions[rule]) for rule, count in result.metrics["rules"].items() if count]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def table(result: Validated, params: Params, page: Path) -> str:
    """Return the table for a terminal, at most 25 lines."""
    metrics, broken = result.metrics, broken_rules(result, params)
    lines = [_counts(metrics), *file_lines(metrics["files"])]
    if broken:
        lines.append(f"{'rule':24}{'rows':>9}  {'action':12}first violation")
    for rule, count, action in broken[:SHOWN_RULES]:
        first = result.examples.get(rule, [None])[0]
        where = f"{first['file']}:{first['line']}: {first['reason'][:SHOWN_REASON]}" if first else "-"
        lines.append(f"{rule:24}{count:9}  {action:12}{where}")
    if len(broken) > SHOWN_RULES:
        lines.append(f"and {len(broken) - SHOWN_RULES} more rules, see the report")
    lines += [f"{rule}: {reason}" for rule, reason in result.summary.notices[:SHOWN_NOTICES]]
    if metrics["unit"] == "characters":
        lines.append(f"not checked without a tokenizer: {', '.join(TOKENIZER_RULES)}")
    if "lengths" in metrics:
        lengths = [f"{k} {v['median']:g} / {v['p99']:g} / {v['max']:g}" for k, v in metrics["lengths"].items()]
        lines.append(f"{metrics['unit']}, median / 99th percentile / maximum: {', '.join(lengths)}")
    return "\n".join([*lines, f"report: {page}"])


def file_lines(files: dict[str, Any]) -> list[str]:
    """Return a line for each file: its layouts, the fields that are not read and what was removed, with rows."""
    lines = []
    for name, file in list(files.items())[:SHOWN_FILES]:
        parts = [f"read as {_counted(file['layouts']) or 'no layout'}"]
        if file["left_out"]:
            parts.append(f"{file['left_out']} of {file['rows']} rows left out by the share of their source")
        parts += [f"not read: {_counted(file['unread'])}"] if file["unread"] else []
        lines.append(f"{name}: {'; '.join(parts + [_counted({note: n}) for note, n in file['notes'].items()])}")
    if len(files) > SHOWN_FILES:
        lines.append(f"and {len(files) - SHOWN_FILES} more files, see the report")
    return lines


def _counted(counts: dict[str, int]) -> str:
    items = sorted(counts.items(), key=lambda item: -item[1])
    more = [f"{len(items) - SHOWN_FIELDS} more"] if len(items) > SHOWN_FIELDS else []
    return ", ".join([*(f"{item} ({count})" for item, count in items[:SHOWN_FIELDS]), *more])


def _counts(metrics: dict[str, Any]) -> str:
    splits = [
        f"{split} {metrics[split]['pairs']} ({metrics[split]['used']} used)"
        for split in ("train", "eval")
        if split in metrics
    ]
    if "eval" not in metrics and (held_out := metrics["accepted"] - metrics["train"]["pairs"]):
        splits.append(f"{held_out} in a held-out split are not trained on")
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
    errors = [f"- {inline(error.message)}" for error in result.errors]
    counts = [f"{_counts(result.metrics)}."]
    if demonstrations := result.metrics.get("demonstrations"):
        counts += ["", f"Demonstrations: {_counts(demonstrations)}."]
    return "\n".join(["## Preference data", "", *counts, "", *errors, "", *listed, ""])


def write_report(result: Validated, params: Params, path: Path, demonstrations: Validated | None = None) -> None:
    """Write the report as an HTML page. All text of the data is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    template = environment.get_template("validation.html.jinja")
    values = {"broken": broken_rules(result, params), "rules": RULES, "params": params.validate}
    values["demonstrations"] = demonstrations and {
        **vars(demonstrations),
        "counts": _counts(demonstrations.metrics),
        "broken": broken_rules(demonstrations, params),
    }
    with atomic_write(path) as tmp:
        tmp.write_text(template.render(result=result, **vars(result), **values))
