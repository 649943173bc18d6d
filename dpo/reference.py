"""Reference log-probs, computed once and kept with a manifest of everything that they depend on.

A cache is a folder with `logps.parquet` (id, chosen, rejected) and `manifest.json`. It is used only if every
entry of its manifest equals what the reader expects; otherwise it is refused with the entry named.

While it is computed, finished shards wait in a folder whose name is the hash of the whole key, so a run that was
cut off goes on where it stopped and can find no shard but its own.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.batching import TokenRow
from dpo.config import Precision
from dpo.errors import InputError
from dpo.files import sha256, write_json, written_whole
from dpo.logps import ENGINE_VERSION, sequence_logps

SHARD_ROWS = 256
"""Rows that are computed, then kept, at a time."""


def cache_key(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    max_length: int,
    precision: Precision,
) -> dict[str, object]:
    """What reference log-probs depend on, by content.

    Args:
        model: the reference policy's folder; weights, config and tokenizer files are hashed.
        tokenizer: its chat template is hashed too.
        rows: the token rows; ids, prompt and completion tokens and their order are hashed.
        max_length: most tokens of prompt and completion.
        precision: of the engine.
    """
    tokens = hashlib.sha256()
    for row in rows:
        tokens.update(json.dumps([row.id, row.prompt, row.completions]).encode())
    return {
        "engine": ENGINE_VERSION,
        "precision": precision,
        "weights": sha256(*sorted(model.glob("*.safetensors"))),
        "config": sha256(model / "config.json"),
        "tokenizer": sha256(*sorted(model.glob("tokenizer*"))),
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "max_length": max_length,
        "rows": tokens.hexdigest(),
    }


def compute_reference(
    folder: Path,
    key: dict[str, object],
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    tokens_per_batch: int,
    progress: Path,
) -> None:
    """Compute the log-probs of R rows (chosen, rejected) shard by shard and write them with their manifest.

    Args:
        folder: the cache, all or nothing.
        key: from `cache_key`, of this model and these rows.
        model: the reference policy, from `dpo.logps.load_model`.
        rows: token rows with the chosen completion first.
        tokens_per_batch: most tokens in one forward pass.
        progress: where shards wait until all are done; survives an interrupted run.
    """
    waiting = progress / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    shards = []
    for start in range(0, len(rows), SHARD_ROWS):
        part = rows[start : start + SHARD_ROWS]
        path = waiting / f"{start}.parquet"
        if not path.is_file():
            title = f"{folder.name} pairs {start + 1} to {start + len(part)} of {len(rows)}"
            logps = sequence_logps(model, part, tokens_per_batch, title)
            with written_whole(path) as aside:
                _table(part, logps).to_parquet(aside, index=False)
        shards.append(pd.read_parquet(path))
    table = pd.concat(shards)
    save_reference(folder, key, rows, torch.tensor(table[["chosen", "rejected"]].to_numpy()))
    shutil.rmtree(waiting)


def save_reference(folder: Path, key: dict[str, object], rows: Sequence[TokenRow], logps: Tensor) -> None:
    """Write log-probs [R, 2] (chosen, rejected) of R rows and their manifest, all or nothing."""
    with written_whole(folder) as aside:
        aside.mkdir()
        _table(rows, logps).to_parquet(aside / "logps.parquet", index=False)
        write_json(aside / "manifest.json", {**key, "logps": sha256(aside / "logps.parquet")})


def _table(rows: Sequence[TokenRow], logps: Tensor) -> pd.DataFrame:
    chosen, rejected = logps.double().unbind(1)
    return pd.DataFrame({"id": [row.id for row in rows], "chosen": chosen.tolist(), "rejected": rejected.tolist()})


def load_reference(folder: Path, key: dict[str, object]) -> dict[str, tuple[float, float]]:
    """(chosen, rejected) reference log-probs in nats by pair id.

    Raises:
        InputError: the cache is absent, incomplete, altered, or was computed from other inputs than `key`
            tells; the message names each input that differs.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        logps = sha256(folder / "logps.parquet")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no whole reference cache here ({error}); run the stage `reference`"
        ) from error
    differing = [name for name, value in {**key, "logps": logps}.items() if manifest.get(name) != value]
    if differing:
        raise InputError(
            f"{folder}: stale reference cache, refused: {', '.join(differing)} differ from those it was computed "
            "with; run the stage `reference` again"
        )
    table = pd.read_parquet(folder / "logps.parquet")
    return {i: (c, r) for i, c, r in zip(table["id"], table["chosen"], table["rejected"], strict=True)}
