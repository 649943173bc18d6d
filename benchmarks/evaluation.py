"""Measure the time of evaluating a policy, divided by that of training it: `python -m benchmarks.evaluation`.

Both stages run in a copy of the project after `dvc repro`, with 256 responses of at most 32 tokens.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

from benchmarks.page import put_table
from dpo.common.files import write_json
from dpo.config import load_params
from dpo.training.settings import Trial

RESULTS = Path("benchmarks/results/evaluation.json")
PAGE = Path("docs/guides/evaluation.md")
RESPONSES, NEW_TOKENS = 256, 32
NEEDED = ("params.yaml", "dpo", "tasks", "data", "models/base", "models/reference", "tokens", "reference")


def prepare(folder: Path) -> None:
    """Copy the inputs of both stages, set the number of responses and sample the reference's."""
    for name in NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if Path(name).is_dir() else shutil.copy)(name, folder / name)
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    params["evaluate"] |= {"samples": RESPONSES, "kl_samples": None, "max_new_tokens": NEW_TOKENS}
    yaml.dump(params, folder / "params.yaml")
    subprocess.run([sys.executable, "-m", "tasks.reference_samples"], cwd=folder, check=True)


def seconds(folder: Path, stage: str, trial: Trial) -> float:
    """Return the seconds that a stage takes, including its start."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"tasks.{stage}", trial.name], cwd=folder, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Run both stages alternately. Write the medians and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    repeats = parser.parse_args().repeats
    params = load_params()
    trial = params.trials()[0]
    times: dict[str, list[float]] = {"train": [], "evaluate": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for _ in range(repeats):
            for stage, values in times.items():
                values.append(seconds(folder, stage, trial))
    train, evaluate = (statistics.median(values) for values in times.values())
    result = {
        "training_pairs": params.data.max_train_pairs,
        "responses": RESPONSES,
        "new_tokens": NEW_TOKENS,
        "repeats": repeats,
        "train_seconds": train,
        "evaluate_seconds": evaluate,
        "ratio": evaluate / train,
    }
    write_json(RESULTS, result)
    put_table(
        PAGE,
        "evaluation",
        "| training, s | evaluation, s | evaluation / training |\n| ---: | ---: | ---: |\n"
        f"| {train:.0f} | {evaluate:.0f} | {evaluate / train:.2f} |",
    )


if __name__ == "__main__":
    main()
