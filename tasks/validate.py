"""Stage `validate`: only sound pairs go on, and every other row is set aside with its reason.

`python -m tasks.validate FILE...` checks files on their own, without the pipeline.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from dpo.config import Params, load_params
from dpo.errors import InputError
from dpo.files import write_json, written_whole
from dpo.preferences.candidates import collect
from dpo.preferences.rules import RULES
from dpo.preferences.sources import read_files
from dpo.preferences.validation import Validated, validate
from tasks.stage import BASE, EVAL, METRICS, PREFERENCES, PROFILE, QUARANTINE, REPORTS, TRAIN, run
from tasks.tracking import log_validation

SHOWN_RULES, SHOWN_NOTICES = 10, 4


def main() -> None:
    """The stage, or a check of the files that are named."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.validate", description="Hold preference data against the contract of params.yaml."
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="files or folders to check on their own")
    parser.add_argument("--model", type=Path, help=f"folder with the tokenizer (default: {BASE}, if it is there)")
    parser.add_argument(
        "--output", type=Path, default=Path("checked"), help="folder to write to (default: checked)"
    )
    arguments = parser.parse_args()
    if arguments.files:
        check_files(load_params(), arguments.files, arguments.model, arguments.output)
    else:
        check_candidates(load_params())


def check_candidates(params: Params) -> None:
    """The stage: the candidate table in, the training and the held-out table out."""
    caps = {"train": params.data.max_train_pairs, "eval": params.data.max_eval_pairs}
    outputs = {"train": TRAIN, "eval": EVAL, "quarantine": QUARANTINE}
    page, metrics = REPORTS / "validate.html", METRICS / "validate.json"
    result = check(params, PREFERENCES, BASE, caps, outputs, page, metrics)
    with written_whole(REPORTS / "validate.md") as aside:
        aside.write_text(markdown(result, params))
    log_validation(params, result.metrics, [page, metrics])
    refuse(result)
    write_json(PROFILE, result.profile)


def check_files(params: Params, files: list[str], model: Path | None, output: Path) -> None:
    """A check on its own: report, metrics and quarantine go to one folder, nothing is trained on.

    Raises:
        InputError: a file cannot be read, there is no such model, or the data must not be used.
    """
    if model is not None and not model.is_dir():
        raise InputError(f"--model: {model} is not a folder; name one that holds the model's tokenizer")
    if model is None and BASE.is_dir():
        model = BASE
    if model is None:
        print(f"no tokenizer in {BASE}: lengths are in characters; name one with --model", file=sys.stderr)
    output.mkdir(parents=True, exist_ok=True)
    candidates = output / "candidates.parquet"
    collect(read_files(files), candidates, ", ".join(files), params.data)
    caps = {"train": None, "eval": None}
    outputs = {name: output / f"{name}.parquet" for name in ("train", "eval", "quarantine")}
    refuse(check(params, candidates, model, caps, outputs, output / "report.html", output / "metrics.json"))


def check(
    params: Params,
    candidates: Path,
    tokenizer: Path | None,
    caps: Mapping[str, int | None],
    outputs: Mapping[str, Path],
    page: Path,
    metrics: Path,
) -> Validated:
    """Validate a candidate table; write the report and the figures, and print the table."""
    result = validate(
        candidates,
        params.validate,
        tokenizer=tokenizer,
        max_length=params.engine.max_length,
        caps=caps,
        seed=params.seed,
        previous=committed_profile(),
        outputs=outputs,
    )
    write_report(result, params, page)
    write_json(metrics, result.metrics)
    print(table(result, params, page))
    return result


def refuse(result: Validated) -> None:
    """Raise InputError, a line for each reason, if the data must not be used."""
    if result.errors:
        raise InputError("\n".join(f"the data must not be used: {error}" for error in result.errors))


def committed_profile() -> dict[str, Any] | None:
    """The profile of the data as last committed, None where there is none."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{PROFILE}"], capture_output=True, check=True)
        return dict(json.loads(shown.stdout))
    except (OSError, subprocess.CalledProcessError, ValueError, TypeError):
        return None


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
    with written_whole(path) as aside:
        aside.write_text(page)


if __name__ == "__main__":
    run(main)
