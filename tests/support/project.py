"""A checkout with a tiny model and 40 pairs, and helpers to change and run it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
TRIAL = "sigmoid-0.1-0.01-17"
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
}
ENV.pop("MLFLOW_TRACKING_URI", None)


def make_project(folder: Path, model: Path) -> Path:
    """Copy this repository to a folder, with a tiny model and 40 pairs in place of the default ones."""
    for name in ("dpo", "tasks", "flows", "functions"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("dvc.yaml", "params.yaml", "pyproject.toml", ".gitignore", ".dvcignore", "prefect.toml"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(model, folder / "models/own/tiny")
    shutil.copytree(ROOT / "data/benchmarks", folder / "data/benchmarks")
    (folder / "data/own").mkdir()
    for name in ("models/rewards", "metrics/reward_model"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("[0-9]*"))
    for name in ("data/.own", "models/.own"):
        (folder / name).symlink_to("own")
    pairs = pd.DataFrame(
        {
            "prompt": [f"Say something about film {number}." for number in range(40)],
            "chosen": [f"Film {number} is a joy and a delight." for number in range(40)],
            "rejected": [f"Film {number} is a bore." for number in range(40)],
            "split": ["train"] * 24 + ["eval"] * 16,
            "agreement": [0.75] * 40,
        }
    )
    pairs.to_json(folder / "data/own/pairs.jsonl", orient="records", lines=True)
    change(
        folder,
        {
            "model.base": "models/own/tiny",
            "data.source": "data/own/pairs.jsonl",
            "data.max_train_pairs": None,
            "engine.max_length": 128,
            "engine.max_tokens_per_microbatch": 400,
            "sft.learning_rate": 1e-2,
            "dpo.pairs_per_step": 8,
            "sweep.learning_rates": [1e-2],
            "sweep.betas": [0.1],
            "evaluate.samples": 8,
            "evaluate.kl_samples": 6,
            "evaluate.judges": [{"kind": "scorer", "function": "dpo.evaluation.judges.scorer:vader_compound"}],
            "evaluate.max_new_tokens": 6,
            "compare.guardrails.max_unfinished": 1.0,
        },
    )
    for command in (
        ["git", "init", "-q"],
        ["dvc", "init", "-q"],
        ["git", "add", "-A"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start"],
    ):
        subprocess.run(command, cwd=folder, env=ENV, check=True)
    return folder


def change(folder: Path, values: dict[str, object]) -> None:
    """Set keys of params.yaml."""
    yaml = YAML()
    params = yaml.load(folder / "params.yaml")
    for key, value in values.items():
        *groups, name = key.split(".")
        target = params
        for group in groups:
            target = target.setdefault(group, {})
        target[name] = value
    yaml.dump(params, folder / "params.yaml")


def execute(folder: Path, *command: str, fails: bool = False) -> str:
    """Run a command in a folder and return its output."""
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) is fails, output[-3000:]
    return output


def book_pairs(first: int, count: int = 20) -> pd.DataFrame:
    """Return valid pairs about the books `first` and following, half of them held out."""
    numbers = range(first, first + count)
    return pd.DataFrame(
        {
            "prompt": [f"What of book {number}?" for number in numbers],
            "chosen": [
                f"Book {number}, with its {number + 7} pages, is a treasure" + " to read twice" * (number % 4 < 2)
                for number in numbers
            ],
            "rejected": [f"Nobody should read book {number} or its {number + 7} pages." for number in numbers],
            "split": ["train", "eval"] * (count // 2),
        }
    )
