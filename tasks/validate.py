"""Stage `validate`: check the raw pairs, write training and held-out pairs, quarantine the rest."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.config import Params, load_params
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA, write_empty
from dpo.data.validate import Validated, validate
from dpo.training.losses import check_agreement, check_rows
from tasks.common.git import committed_file
from tasks.common.paths import (
    BASE,
    BENCHMARKS,
    DEMONSTRATIONS,
    EVAL,
    METRICS,
    PROFILE,
    QUARANTINE,
    QUARANTINED_DEMONSTRATIONS,
    RAW_DEMONSTRATIONS,
    RAW_PAIRS,
    REPORTS,
    TRAIN,
)
from tasks.common.runner import check_store, run
from tasks.report.validation import markdown, table, write_report


def main() -> None:
    """Validate the raw pairs and log the result."""
    params = load_params()
    check_store()
    caps = {"train": params.data.max_train_pairs, "eval": params.data.max_eval_pairs}
    files = {"report": REPORTS / "validate.html", "metrics": METRICS / "validate.json"}
    outputs = {"train": TRAIN, "eval": EVAL, "quarantine": QUARANTINE, **files}
    result = validate_and_report(params, RAW_PAIRS, params.data.origin, BASE, caps, outputs, RAW_DEMONSTRATIONS)
    with atomic_write(REPORTS / "validate.md") as tmp:
        tmp.write_text(markdown(result, params))
    from tasks.tracking.runs import log_validation  # after the checks: MLflow starts slowly

    log_validation(params, result.metrics, list(files.values()))
    raise_errors(result)
    # `sweep` is no parameter of this stage, so the stage `train` checks the losses, too.
    losses = [trial.loss for trial in params.trials() if trial.method is None]
    check_rows(losses, labelled=result.metrics["kind"] == "labelled")
    for path in (TRAIN, EVAL):
        known = pd.read_parquet(path, columns=["id", "agreement"]).dropna()
        check_agreement(losses, dict(zip(known["id"].tolist(), known["agreement"].tolist(), strict=True)))
    write_json(PROFILE, result.summary.profile)


def validate_and_report(
    params: Params,
    raw_pairs: Path,
    origin: str,
    tokenizer: Path | None,
    caps: dict[str, int | None],
    outputs: dict[str, Path],
    raw_demonstrations: Path | None = None,
) -> Validated:
    """Validate raw tables, write `outputs`, including `report` and `metrics`, and print tables."""
    same: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_length": params.engine.max_length,
        "seed": params.seed,
        "benchmarks": BENCHMARKS,
    }
    previous = committed_profile()
    result = validate(
        raw_pairs, params.validate, **same, caps=caps, origin=origin, previous=previous, outputs=outputs
    )
    demonstrations = None
    if raw_demonstrations and (source := params.demonstrations):
        places = {"train": DEMONSTRATIONS, "quarantine": QUARANTINED_DEMONSTRATIONS}
        demonstrations = validate(
            raw_demonstrations, params.validate, **same, caps={"train": None}, origin=source.origin, previous=None,
            outputs=places, tested=result.held_out,
        )  # fmt: skip
        result.metrics["demonstrations"] = demonstrations.metrics
        result.errors.extend(
            replace(error, message=f"demonstrations: {error.message}") for error in demonstrations.errors
        )
    elif raw_demonstrations:
        write_empty(DEMONSTRATIONS, PAIRS_SCHEMA)
        write_empty(QUARANTINED_DEMONSTRATIONS, RAW_PAIRS_SCHEMA)
    write_report(result, params, outputs["report"], demonstrations)
    write_json(outputs["metrics"], result.to_json())
    print(table(result, params, outputs["report"]))
    if demonstrations:
        print(f"demonstrations: {table(demonstrations, params, outputs['report'])}")
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
