"""Reports of a validation: the page, the terminal and Markdown."""

import dataclasses
import re
from pathlib import Path

import jinja2
import pytest

from dpo.data.rules import DATA_RULES, RULES
from tasks.common.markdown import inline
from tasks.report import validation as report
from tests.support.validation import PARAMS, ROWS, check, row, settings_of


@pytest.fixture(scope="module")
def broken_result(tmp_path_factory):
    """Validate rows whose texts are HTML and template code."""
    code = "<script>alert(1)</script>{{ 7*7 }}"
    rows = [
        *(row(i, source="even") for i in range(40)),
        *(row(i, source=f"{code}\n|", split="train") for i in range(40, 64)),
        row(70, prompt=code, chosen="", id=code),
        row(71, prompt=code, chosen=f"{code}\x00", rejected=f"{code}cafÃ©"),
        row(72, split=code),
        b"<script>alert(2)</script>\n",
    ]
    folder = tmp_path_factory.mktemp("broken_result")
    previous, _ = check(folder / "before", [row(i) for i in range(40)])
    return check(folder, rows, settings_of(control_characters="error"), previous=previous.summary.profile)[0]


def test_the_page_escapes_all_text_and_loads_nothing(broken_result, tmp_path):
    report.write_report(broken_result, PARAMS, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7*7 }}" in page
    assert "&lt;script&gt;alert(2)" in page
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)
    assert "every source is in both splits" in page
    for rule in ("empty_completion", "control_characters", "unknown_split", "unreadable_row", "source_imbalance"):
        assert rule in page
    for part in ("prompt", "chosen", "rejected"):
        assert f"histogram of {part}" in page
    assert re.search(
        r"The data must not be used: [^<]*, line \d+: [^<]*rule &#39;control_characters&#39;, 1 in total", page
    )
    assert "population stability index" in page


def everything(broken_result):
    """Return the result with every rule broken."""
    metrics = {**broken_result.metrics, "rules": {rule: number + 1 for number, rule in enumerate(RULES)}}
    example = next(iter(broken_result.examples.values()))
    return dataclasses.replace(
        broken_result,
        metrics=metrics,
        summary=dataclasses.replace(
            broken_result.summary, notices=[(rule, f"reason {i}") for i in range(5) for rule in DATA_RULES]
        ),
        examples=dict.fromkeys(RULES, example),
    )


def test_the_terminal_table_has_at_most_twenty_five_lines(broken_result):
    for result in (broken_result, everything(broken_result)):
        shown = report.table(result, PARAMS, Path("reports/validate.html")).splitlines()
        assert len(shown) <= 25
        assert all(line.isprintable() for line in shown)
    assert f"and {len(RULES) - report.SHOWN_RULES} more rules, see the report" in shown
    counts = [int(line.split()[1]) for line in shown[3 : 3 + report.SHOWN_RULES]]
    assert counts == sorted(range(len(RULES) + 1), reverse=True)[: report.SHOWN_RULES]


def test_markdown_contains_all_broken_rules(broken_result):
    text = report.markdown(everything(broken_result), PARAMS)
    assert f"{broken_result.metrics['rows']} rows: {broken_result.metrics['accepted']} accepted" in text
    assert f"- {inline(broken_result.errors[0].message)}" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(RULES)
    assert {line.count("|") for line in table} == {6}
    for number, rule in enumerate(RULES):
        assert any(line.startswith(f"| {rule} | {number + 1} | ") for line in table)
    assert "<script" not in text


def test_reports_say_that_no_rule_is_broken(tmp_path):
    result, _ = check(tmp_path, ROWS)
    assert "No rule is broken." in report.markdown(result, PARAMS)
    report.write_report(result, PARAMS, tmp_path / "report.html")
    assert f"All rows satisfy all {len(RULES)} rules." in (tmp_path / "report.html").read_text()
    assert "No earlier version of the data with lengths in characters" in (tmp_path / "report.html").read_text()


def test_the_template_uses_no_undefined_value(broken_result, tmp_path, monkeypatch):
    monkeypatch.setattr(
        report, "Environment", lambda **options: jinja2.Environment(undefined=jinja2.StrictUndefined, **options)
    )
    for number, result in enumerate((broken_result, everything(broken_result))):
        report.write_report(result, PARAMS, tmp_path / f"{number}.html")
        report.write_report(result, PARAMS, tmp_path / f"{number}.html", demonstrations=result)
