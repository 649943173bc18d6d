"""Rows, and their validation in a folder."""

import json
from pathlib import Path

import pandas as pd

from dpo.config import load_params
from dpo.data.ingest import write_raw_pairs
from dpo.data.readers import read_files
from dpo.data.rules import RULES
from dpo.data.settings import DataSettings, ValidateSettings
from dpo.data.validate import validate

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
DATA = DataSettings(
    source="default",
    revision=None,
    pairing="best_worst",
    max_train_pairs=None,
    max_eval_pairs=None,
    eval_fraction=0.5,
    min_rating_gap=0.0,
)
ACTIONS = {name: "quarantine" for name, rule in RULES.items() if "quarantine" in rule.allowed}
SPLITS = ("train", "eval")


def settings_of(*, max_quarantined=1.0, max_longer_share=0.65, **rules):
    return ValidateSettings(
        max_quarantined=max_quarantined,
        near_duplicate_similarity=0.9,
        max_longer_share=max_longer_share,
        max_drift=0.25,
        rules={**ACTIONS, **rules},
    )


def row(number, **changes):
    """Return a valid, unique pair. One in four is held out. Chosen is the longer one in half of them."""
    sides = [f"joy{number}", f"bore{number} indeed{number}"]
    chosen, rejected = sides if number // 4 % 2 else reversed(sides)
    split = "train" if number % 4 else "eval"
    fields = {
        "id": f"p{number}",
        "prompt": f"Film {number}?",
        "chosen": chosen,
        "rejected": rejected,
        "split": split,
    }
    return {**fields, **changes}


def lines_of(rows):
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in rows)


def check(folder, rows, params=None, *, tokenizer=None, max_length=512, caps=None, seed=1, previous=None):
    """Ingest and validate rows in a folder; return the result and the written tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_bytes(lines_of(rows))
    write_raw_pairs(read_files([str(folder / "data.jsonl")]), folder / "raw_pairs.parquet", "data", DATA)
    return validated(
        folder,
        params or settings_of(),
        tokenizer=tokenizer,
        max_length=max_length,
        caps=caps or dict.fromkeys(SPLITS),
        seed=seed,
        previous=previous,
    )


def validated(folder, params=None, **arguments):
    defaults = {"tokenizer": None, "max_length": 512, "caps": dict.fromkeys(SPLITS), "seed": 1, "previous": None}
    defaults |= {"origin": "data", "benchmarks": folder / "benchmarks"}
    outputs = {name: folder / f"{name}.parquet" for name in (*SPLITS, "quarantine")}
    result = validate(
        folder / "raw_pairs.parquet", params or settings_of(), outputs=outputs, **defaults | arguments
    )
    json.dumps([result.to_json(), result.summary.profile], allow_nan=False)
    return result, {name: pd.read_parquet(path) for name, path in outputs.items() if path.exists()}


def ids(table):
    return table["id"].tolist()


LONG = {side: " ".join(f"{side}{i}" for i in range(80)) for side in ("chosen", "rejected")}
BAD = {
    "unreadable_row": b'{"prompt": \n',
    "invalid_utf8": b'{"prompt": "caf\xe9"}\n',
    "lone_surrogate": row(100, chosen="\ud83c"),
    "wrong_type": row(100, chosen=7),
    "missing_text": row(100, rejected=None),
    "broken_roles": row(100, prompt=[{"role": "critic", "content": "Film 100?"}]),
    "unknown_split": row(100, split="holdout"),
    "empty_completion": row(100, chosen=" "),
    "identical_completions": row(100, chosen="Joy.", rejected="joy. "),
    "control_characters": row(100, prompt="Film\x00 100?"),
    "mojibake": row(100, chosen="cafÃ©"),
    "special_tokens": row(100, prompt="Film<|im_end|> 100?"),
    "completion_too_long": row(100, chosen="joy " * 200),
    "prompt_truncated": row(100, prompt="Film " * 200),
    "duplicate_id": row(100, id="p1"),
    "duplicate_pair": row(1, id="p100"),
    "near_duplicate_pair": row(100, **{**LONG, "id": "twin", "rejected": LONG["rejected"] + " end"}),
    "contradiction": row(100, prompt="Film 1?", chosen=row(1)["rejected"], rejected=row(1)["chosen"]),
    "prompt_in_both_splits": row(101, prompt="Film 0?"),
    "eval_text_in_train": row(101, rejected=row(0)["chosen"]),
}
ROWS = [row(number) for number in range(12)]
