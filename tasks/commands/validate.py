"""Check data files on their own, without the pipeline: `python -m tasks.commands.validate FILE...`."""

import argparse
import sys
from pathlib import Path

from dpo.common.errors import InputError
from dpo.config import Params, load_params
from dpo.data.ingest import collect
from dpo.data.readers import read_files
from tasks.common.paths import BASE
from tasks.common.runner import run
from tasks.validate import check, refuse


def main() -> None:
    """Check the files that are named."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.commands.validate", description="Check preference data against the data contract."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="files or folders to check")
    parser.add_argument("--model", type=Path, help=f"folder with the tokenizer (default: {BASE}, if it exists)")
    parser.add_argument(
        "--output", type=Path, default=Path("checked"), help="folder to write to (default: checked)"
    )
    arguments = parser.parse_args()
    check_files(load_params(), arguments.files, arguments.model, arguments.output)


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


if __name__ == "__main__":
    run(main)
