"""Validate data files without running the pipeline."""

import sys
from pathlib import Path

from dpo.common.errors import InputError
from dpo.common.files import write_json
from dpo.config import Params
from dpo.data.ingest import write_raw_pairs
from dpo.data.readers import read_files
from tasks.common.paths import BASE
from tasks.validate import raise_errors, validate_and_report


def check_files(params: Params, files: list[str], model: Path | None, output: Path) -> None:
    """Check data files; write report, metrics, quarantine and accepted pairs to a folder.

    `output/metrics.json` has a list `errors` of {code, message}, which is empty if the data can be used.
    If `model` is None, the tokenizer of the base model is used, if it exists.

    Raises:
        InputError: a file is unreadable, the model is missing, or the data must not be used.
    """
    if model is not None and not model.is_dir():
        raise InputError(f"--model: {model} is not a folder; name one that contains the model's tokenizer")
    tokenizer = model or (BASE if BASE.is_dir() else None)
    if tokenizer is None:
        print(f"no tokenizer in {BASE}: lengths are in characters; set one with --model", file=sys.stderr)
    raw_pairs, metrics = output / "raw_pairs.parquet", output / "metrics.json"
    metrics.unlink(missing_ok=True)
    try:
        write_raw_pairs(read_files(files), raw_pairs, ", ".join(files), params.data)
    except InputError as error:
        write_json(metrics, {"errors": [{"code": "unreadable", "message": str(error)}]})
        raise
    outputs = {name: output / f"{name}.parquet" for name in ("train", "eval", "quarantine")}
    outputs |= {"report": output / "report.html", "metrics": metrics}
    raise_errors(validate_and_report(params, raw_pairs, tokenizer, {"train": None, "eval": None}, outputs))
