"""Compare speed and memory on one GPU with TRL and transformers: `python -m benchmarks.gpu`.

The cases are in `benchmarks.gpu_cases`. Results are written after each case; the next run continues with the cases
that have no result of this GPU, these package versions and these settings. A case starts only if it can end within
the time limit. Only `dpo` and `benchmarks` are imported, nothing else of the project. The packages are checked
before they are imported.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.common.errors import InputError

if TYPE_CHECKING:
    from benchmarks.gpu_cases import GpuCase

RESULTS, PAGE = Path("benchmarks/results/gpu.json"), Path("docs/internals/benchmarks.md")
WHEELS_MIB = 60
"""Maximum size of the wheels that are carried to a GPU machine without access to a package index."""

PACKAGES = (
    "accelerate", "annotated-types", "bitsandbytes", "datasets", "dill", "huggingface-hub", "jinja2",
    "liger-kernel", "multiprocess", "numpy", "pandas", "peft", "psutil", "pyarrow", "pydantic",
    "pydantic-core", "pytest", "ruamel.yaml", "safetensors", "tokenizers", "torch", "tqdm", "transformers",
    "triton", "trl", "typing-inspection", "xxhash",
)  # fmt: skip
"""Packages that the cases import, and those of their requirements that transformers, peft and accelerate lack."""
GPU_ONLY = ("liger-kernel", "triton")


def check_packages(packages: tuple[str, ...], wheels: Path | None = None) -> None:
    """Check that packages are installed or have a wheel in a folder, whose size is limited.

    Raises:
        InputError: the line names all packages that are missing, or the size of the wheels.
    """
    if wheels and not wheels.is_dir():
        raise InputError(f"--wheels: {wheels} is not a folder")
    files = sorted(wheels.glob("*.whl")) if wheels else []
    given = {file.name.split("-")[0].lower().replace("_", "-") for file in files}
    missing = [name for name in packages if not (is_installed(name) or name.replace(".", "-") in given)]
    faults = []
    if missing:
        faults.append(
            f"packages are missing; install them with `pip install {' '.join(missing)}`, or carry their wheels, "
            f"together at most {WHEELS_MIB} MiB"
        )
    size = sum(file.stat().st_size for file in files) / 2**20
    if size > WHEELS_MIB:
        faults.append(f"{wheels}: the wheels have {size:.1f} MiB, more than {WHEELS_MIB}; remove some of them")
    if faults:
        raise InputError("benchmarks.gpu: " + "; ".join(faults))


def is_installed(package: str) -> bool:
    """Return whether a package is installed."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def check_gpu() -> None:
    """Raise InputError if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("benchmarks.gpu: no CUDA GPU; run it on a machine with one, or use --dry-run or --table")


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results in a file by case."""
    return {entry["case"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}


def measure_all(cases: "list[GpuCase]", options: argparse.Namespace) -> list[str]:
    """Measure the cases without a result of this environment, all with `--again`, and write each result.

    Returns:
        The cases that are left, because they failed or the time limit was reached.
    """
    from benchmarks import gpu_cases
    from benchmarks.engine import say
    from dpo.common.files import write_json

    start, longest = time.monotonic(), 0.0
    results, here = read_results(options.output), gpu_cases.environment()
    marks = {case.name: here | {"setting": setting(case, options)} for case in cases}
    left = [
        case
        for case in cases
        if options.again or not results.get(case.name, {}).items() >= marks[case.name].items()
    ]
    say(f"{len(cases) - len(left)} of {len(cases)} cases have a result")
    failed: list[str] = []
    while left and time.monotonic() - start + longest < 60 * options.minutes:
        case, began = left.pop(0), time.monotonic()
        try:
            results[case.name] = measure(case, options) | marks[case.name]
            write_json(options.output, [results[each.name] for each in gpu_cases.CASES if each.name in results])
        except Exception as error:  # noqa: BLE001 - the other cases do not depend on it
            traceback.print_exc()
            say(f"{case.name}: failed, {type(error).__name__}: {error}")
            failed.append(case.name)
        longest = max(longest, time.monotonic() - began)
    return failed + [case.name for case in left]


def measure(case: "GpuCase", options: argparse.Namespace) -> dict[str, Any]:
    """Measure one case in a temporary folder."""
    from benchmarks import gpu_cases

    with tempfile.TemporaryDirectory() as folder:
        return gpu_cases.measure(case, Path(folder), options.steps, options.repeats)


def setting(case: "GpuCase", options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a case that its result depends on."""
    return {**vars(case), "steps": options.steps, "repeats": options.repeats}


def dry_run(cases: "list[GpuCase]", options: argparse.Namespace) -> None:
    """Run the code of the cases on the CPU with a tiny model, and print the table. Nothing is written."""
    from benchmarks import gpu_cases
    from benchmarks.engine import say

    results = [measure(dataclasses.replace(case, gpu=False), options) for case in cases]
    say(gpu_cases.table(results))


def run(options: argparse.Namespace) -> int:
    """Do what the options say; return 1 if cases are left.

    Raises:
        InputError: packages or the GPU are missing, the wheels are too large, or a case is unknown.
    """
    if options.wheels:
        check_packages(PACKAGES, options.wheels)
        sys.stdout.write(f"all packages are installed or in {options.wheels}\n")
        return 0
    on_cpu = options.dry_run or options.table
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_packages(tuple(name for name in PACKAGES if not (on_cpu and name in GPU_ONLY)))
    from benchmarks import gpu_cases
    from benchmarks.engine import say
    from benchmarks.page import put_table

    names = [case.name for case in gpu_cases.CASES]
    unknown = set(options.cases or names) - set(names)
    if unknown:
        raise InputError(f"--cases: no case {', '.join(sorted(unknown))}; the cases are {', '.join(names)}")
    selected = [case for case in gpu_cases.CASES if case.name in (options.cases or names)]
    if options.dry_run:
        dry_run(selected, options)
        return 0
    left = []
    if not options.table:
        check_gpu()
        left = measure_all(selected, options)
    table = gpu_cases.table(list(read_results(options.output).values()))
    if options.output == RESULTS:
        put_table(PAGE, "gpu", table)
    say(table)
    if left:
        say(f"left: {', '.join(left)}; run the same command again")
    return int(bool(left))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    line = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Compare the engine with TRL and transformers on a GPU."
    )
    line.add_argument("--cases", nargs="+", help="default: all")
    line.add_argument("--again", action="store_true", help="measure also cases that have a result")
    line.add_argument("--steps", type=int, default=3, help="timed steps of 8 pairs")
    line.add_argument("--repeats", type=int, default=1, help="runs per side")
    line.add_argument(
        "--minutes", type=float, default=9,
        help="time limit; a case starts only if the time for the longest case so far is left",
    )  # fmt: skip
    line.add_argument(
        "--output", type=Path, default=RESULTS, help="results file; only the default file updates the page"
    )
    line.add_argument("--dry-run", action="store_true", help="run all code on the CPU with tiny models")
    line.add_argument("--table", action="store_true", help="do not measure; write the page")
    line.add_argument(
        "--wheels", type=Path, help="do not measure; check that all packages are installed or in this folder"
    )
    return line


def main() -> int:
    """Run the command line; return 2 after an error of the input."""
    try:
        return run(parser().parse_args())
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
