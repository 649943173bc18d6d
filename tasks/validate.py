"""Stage `validate`: check the raw pairs, write training and held-out pairs, quarantine the rest."""

import json
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.config import Params, load_params
from dpo.data.validate import Validated, validate
from tasks.common.git import committed_file
from tasks.common.paths import BASE, BENCHMARKS, EVAL, METRICS, PROFILE, QUARANTINE, RAW_PAIRS, REPORTS, TRAIN
from tasks.common.runner import run
from tasks.report.validation import markdown, table, write_report


def main() -> None:
    """Validate the raw pairs and log the result."""
    params = load_params()
    caps = {"train": params.data.max_train_pairs, "eval": params.data.max_eval_pairs}
    files = {"report": REPORTS / "validate.html", "metrics": METRICS / "validate.json"}
    outputs = {"train": TRAIN, "eval": EVAL, "quarantine": QUARANTINE, **files}
    result = validate_and_report(params, RAW_PAIRS, params.data.origin, BASE, caps, outputs)
    with atomic_write(REPORTS / "validate.md") as tmp:
        tmp.write_text(markdown(result, params))
    from tasks.tracking.runs import log_validation  # after the checks: MLflow starts slowly

    log_validation(params, result.metrics, list(files.values()))
    raise_errors(result)
    write_json(PROFILE, result.summary.profile)


def validate_and_report(
    params: Params,
    raw_pairs: Path,
    origin: str,
    tokenizer: Path | None,
    caps: dict[str, int | None],
    outputs: dict[str, Path],
) -> Validated:
    """Validate a raw table, write `outputs`, including `report` and `metrics`, and print a table."""
    result = validate(
        raw_pairs,
        params.validate,
        tokenizer=tokenizer,
        max_length=params.engine.max_length,
        caps=caps,
        seed=params.seed,
        benchmarks=BENCHMARKS,
        origin=origin,
        previous=committed_profile(),
        outputs=outputs,
    )
    write_report(result, params, outputs["report"])
    write_json(outputs["metrics"], result.to_json())
    print(table(result, params, outputs["report"]))
    return result


def raise_errors(result: Validated) -> None:
    """Raise InputError, with one line per error, if the data must not be used."""
    if result.errors:
        raise InputError("\n".join(f"the data must not be used: {error.message}" for error in result.errors))


def committed_profile() -> dict[str, Any] | None:
    """Return the profile of the data in the last commit, or None if there is none."""
    try:
        return dict(json.loads(committed_file(PROFILE) or b""))
    except (ValueError, TypeError):
        return None


if __name__ == "__main__":
    run(main)
