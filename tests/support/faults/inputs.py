"""Faults of data: changed inputs, flipped bits, non-finite numbers."""

import math
import random
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file

from tests.support.faults.projects import POLICY, REFERENCE, Projects, Repro, Stage, assert_same
from tests.support.project import change


def flip(path: Path, where: float = 0.5) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def append_space(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def other_order(path: Path) -> None:
    pd.read_parquet(path).iloc[::-1].to_parquet(path)


def another_text(path: Path) -> None:
    pairs = pd.read_parquet(path)
    pairs.loc[0, "chosen"] += "!"
    pairs.to_parquet(path)


def another_engine() -> None:
    import_module("dpo.engine.reference_cache").ENGINE_VERSION += 1


TAMPERED: list[tuple[str, Callable[[Path], None], str]] = [
    (f"{REFERENCE}/model.safetensors", lambda path: flip(path, 1), "weights"),
    (f"{REFERENCE}/config.json", append_space, "config"),
    (f"{REFERENCE}/tokenizer.json", append_space, "tokenizer"),
    (f"{REFERENCE}/chat_template.jinja", append_space, "template"),
    ("data/train.parquet", other_order, "pairs"),
    ("data/train.parquet", another_text, "pairs"),
    ("tokens/train/table.arrow", flip, "table"),
    ("params.yaml", lambda path: change(path.parent, {"engine.max_length": 127}), "max_length"),
    ("params.yaml", lambda path: change(path.parent, {"engine.precision": "bf16"}), "precision"),
    ("params.yaml", lambda path: change(path.parent, {"engine.compile": True}), "compile"),
    ("reference/train/logps.arrow", flip, "logps"),
]
"""Inputs of a training's token table and reference cache: a file, how it is changed, and the name in the error."""


def tampered_by_hand(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Change each input of a training without DVC; the stage refuses table or cache, and names the input."""
    projects.trained(folder)
    for name, tamper, key in TAMPERED:
        tamper(folder / name)
        refused = rf"(tokens|reference)/train: stale (token table|reference cache), refused: .*\b{key}\b.* differ"
        Stage(folder, "train").wait(2, refused)
        shutil.copy2(projects.done / name, folder / name)
    Stage(folder, "train", before=another_engine).wait(2, "refused: engine differ")
    (folder / "reference/train/manifest.json").write_text("{")
    Stage(folder, "train").wait(2, r"reference/train: no .*reference cache")
    assert not (folder / POLICY).exists()


def tampered_under_dvc(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Flip a bit of every result that later stages read; `dvc repro` recomputes or restores it."""
    shutil.copytree(projects.done, folder, dirs_exist_ok=True)
    weights = [f"{model}/model.safetensors" for model in ("models/base", REFERENCE, str(POLICY))]
    names = ["data/train.parquet", "data/eval.parquet", "tokens/train/table.arrow"]
    names += ["reference/train/logps.arrow", *weights]
    for name in names:
        flip(folder / name, draw.random())
    Repro(folder).wait()
    assert_same(folder, projects)


def not_finite(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Put an infinity into the weights; training stops before its first step and names the pairs."""
    projects.trained(folder)
    shutil.rmtree(folder / REFERENCE)
    weights = load_file(folder / "models/base/model.safetensors")
    weights["model.norm.weight"][draw.randrange(32)] = math.inf
    save_file(weights, folder / "models/base/model.safetensors", {"format": "pt"})
    Stage(folder, "sft").wait(1, r"step 1: the loss is nan, from the pairs \S+")
    assert not (folder / REFERENCE).exists()
    assert list((folder / ".training-progress/sft").glob("*/non-finite-step-1-*.json"))
