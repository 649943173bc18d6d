"""From any accepted source of preference pairs to the canonical table."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dpo.config import DataParams
from dpo.embedded import RATINGS_SDIST, fetch
from dpo.errors import InputError
from dpo.preferences.human_ratings import rating_pairs, read_ratings

OWN_DATA = Path("data/own")
READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".jsonl": lambda path: pd.read_json(path, lines=True),
    ".csv": pd.read_csv,
    ".parquet": pd.read_parquet,
}
TEXTS = ["prompt", "chosen", "rejected"]
OPTIONAL = {"source": str, "agreement": float, "chosen_rating": float, "rejected_rating": float}


def load_pairs(params: DataParams, seed: int) -> pd.DataFrame:
    """The canonical table of `params.source`, with at most the wanted number of pairs in each split.

    Raises:
        InputError: the source is not there, cannot be read, or lacks a column; names it and the mend.
    """
    local = Path(params.source).suffix in READERS
    if params.revision is not None and (params.source == "embedded" or local):
        raise InputError("params.yaml: data.revision has no effect: data.source is no hub id; set it to null")
    if params.source == "embedded":
        with tempfile.TemporaryDirectory() as folder:
            domains = read_ratings(fetch(RATINGS_SDIST, Path(folder), source=True))
        table = rating_pairs(
            domains, min_rating_gap=params.min_rating_gap, eval_fraction=params.eval_fraction, seed=seed
        )
    else:
        raw = _read_file(Path(params.source)) if local else _read_hub(params.source, params.revision)
        table = canonical(raw, params.source, params.eval_fraction)
    caps = {"train": params.max_train_pairs, "eval": params.max_eval_pairs}
    parts = [table[~table["split"].isin(list(caps))]]
    for split, cap in caps.items():
        part = table[table["split"] == split]
        parts.append(part if cap is None else part.sample(min(cap, len(part)), random_state=seed))
    return pd.concat(parts).sort_index().reset_index(drop=True)


def _read_file(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"params.yaml: data.source: {path} is not a file; put your data under {OWN_DATA}/")
    if OWN_DATA.resolve() not in path.absolute().parents:
        raise InputError(
            f"params.yaml: data.source: {path} is outside {OWN_DATA}/, the folder whose content DVC watches; "
            f"copy the file there and name it as {OWN_DATA / path.name}"
        )
    try:
        return READERS[path.suffix](path)
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: not a readable {path.suffix} file: {error}") from error


def _read_hub(name: str, revision: str | None) -> pd.DataFrame:
    import datasets

    if revision is None:
        raise InputError(
            f"params.yaml: data.source: '{name}' is neither `embedded` nor a {', '.join(READERS)} file, so it is "
            "taken for a hub id, which needs data.revision: without one nobody can reproduce the run"
        )
    try:
        splits = datasets.load_dataset(name, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"params.yaml: data.source: cannot load '{name}' at '{revision}': {error}") from error
    held_out = {"test", "validation", "eval"} & set(splits)
    tables = {split: data.to_pandas() for split, data in splits.items()}
    if held_out and held_out != set(splits):
        tables = {k: table.assign(split="eval" if k in held_out else "train") for k, table in tables.items()}
    return pd.concat(tables.values(), ignore_index=True)


def canonical(raw: pd.DataFrame, origin: str, eval_fraction: float) -> pd.DataFrame:
    """Bring a table with `prompt`, `chosen` and `rejected` strings into the canonical form.

    A missing `id` becomes a hash of the content; a missing `split` is decided by a hash of the prompt, so that
    adding rows moves no old row to the other side.

    Raises:
        InputError: a column is missing, or a text column holds something else; names row and field.
    """
    missing = [field for field in TEXTS if field not in raw]
    if missing:
        raise InputError(
            f"{origin}: missing column {', '.join(map(repr, missing))} (found {', '.join(map(repr, raw))}); "
            "each row needs the strings 'prompt', 'chosen' and 'rejected'"
        )
    for field in TEXTS:
        bad = [row for row, value in enumerate(raw[field]) if not isinstance(value, str)]
        if bad:
            raise InputError(
                f"{origin}: row {bad[0]}, field '{field}': expected a string, got {raw[field].iloc[bad[0]]!r} "
                f"({len(bad)} such rows); mend or remove them"
            )
    table = raw[TEXTS].astype(str)
    texts = list(zip(*(table[field] for field in TEXTS), strict=True))
    table.insert(0, "id", raw["id"].astype(str) if "id" in raw else [_hash("\x1f".join(t))[:16] for t in texts])
    table["split"] = (
        raw["split"].astype(str)
        if "split" in raw
        else ["eval" if int(_hash(prompt)[:8], 16) < eval_fraction * 2**32 else "train" for prompt, *_ in texts]
    )
    for field, kind in OPTIONAL.items():
        default = Path(origin).name if kind is str else float("nan")
        try:
            table[field] = raw[field].astype(kind) if field in raw else default
        except (TypeError, ValueError) as error:
            raise InputError(f"{origin}: field '{field}': expected {kind.__name__}: {error}") from error
    return table.reset_index(drop=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
