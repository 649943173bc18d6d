"""Stage `validate`: check every pair against the data contract and quarantine the rows that break it."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.config import Params, load_params
from dpo.data.validate import Validated, validate
from tasks.common.paths import BASE, EVAL, METRICS, PROFILE, QUARANTINE, RAW_PAIRS, REPORTS, TRAIN
from tasks.common.runner import run
from tasks.report.validation import markdown, table, write_report
from tasks.tracking.runs import log_validation


def main() -> None:
    """The stage: the candidate table in, the training and the held-out table out."""
    params = load_params()
    caps = {"train": params.data.max_train_pairs, "eval": params.data.max_eval_pairs}
    outputs = {"train": TRAIN, "eval": EVAL, "quarantine": QUARANTINE}
    page, metrics = REPORTS / "validate.html", METRICS / "validate.json"
    result = check(params, RAW_PAIRS, BASE, caps, outputs, page, metrics)
    with atomic_write(REPORTS / "validate.md") as tmp:
        tmp.write_text(markdown(result, params))
    log_validation(params, result.metrics, [page, metrics])
    refuse(result)
    write_json(PROFILE, result.profile)


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


if __name__ == "__main__":
    run(main)
