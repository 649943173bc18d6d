"""Schemas of the raw table, which stage `ingest` writes, and of the pairs that stage `validate` accepts."""

import json
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pandera.pandas as pa
import pyarrow
import pyarrow.parquet
from pandera.config import ValidationDepth, config_context
from pandera.typing.pandas import Series

from dpo.common.errors import InputError
from dpo.common.files import atomic_write

TEXT = pyarrow.string()
TURN_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
TURNS = pyarrow.list_(pyarrow.struct(dict.fromkeys(TURN_FIELDS, TEXT)))
PAIR_FIELDS = {
    **{"id": TEXT, "prompt": TEXT, "turns": TURNS, "chosen": TEXT, "rejected": TEXT},
    **{"chosen_turns": TURNS, "rejected_turns": TURNS, "tools": TEXT},
    **dict.fromkeys(("chat_template_kwargs", "split", "source"), TEXT),
    **dict.fromkeys(("weight", "agreement", "chosen_rating", "rejected_rating"), pyarrow.float64()),
}
ORIGIN_FIELDS = {"file": TEXT, "line": pyarrow.int64(), "original": TEXT, "rule": TEXT, "reason": TEXT}
JSON_COLUMNS = ("tools", "chat_template_kwargs")
TURN_COLUMNS = ("turns", "chosen_turns", "rejected_turns")
PAIRS_SCHEMA = pyarrow.schema(PAIR_FIELDS)
RAW_PAIRS_SCHEMA = pyarrow.schema(PAIR_FIELDS | ORIGIN_FIELDS)
"""Also the schema of the quarantine, in which `rule` and `reason` are never null."""


class Fields(pa.DataFrameModel):
    """The columns that both tables have."""

    id: Series[str] = pa.Field(nullable=True)
    """Stable name of the pair: the one in the source, or a hash of its texts."""
    prompt: Series[str] = pa.Field(nullable=True)
    """The request, without a chat template. For a conversation: its transcript."""
    turns: Series[object] = pa.Field(nullable=True)
    """The prompt's turns if it is more than one user turn, else null. A turn has `role` and `content`, and
    may have `reasoning_content`, `tool_calls` (as JSON), `tool_call_id` and `name`."""
    chosen: Series[str] = pa.Field(nullable=True)
    """The preferred completion."""
    rejected: Series[str] = pa.Field(nullable=True)
    """The other completion."""
    chosen_turns: Series[object] = pa.Field(nullable=True)
    """Its turns if it is more than one text of the assistant, else null. `chosen` then has their texts."""
    rejected_turns: Series[object] = pa.Field(nullable=True)
    """The same for `rejected`."""
    tools: Series[str] = pa.Field(nullable=True)
    """The tools that the assistant may call, as JSON."""
    chat_template_kwargs: Series[str] = pa.Field(nullable=True)
    """Variables of the chat template for this row, as a JSON object."""
    split: Series[str] = pa.Field(isin=["train", "eval"], nullable=True)
    """`eval` rows are never trained on."""
    source: Series[str] = pa.Field(nullable=True)
    """Origin of the pair. Metrics are also reported by source."""
    weight: Series[float] = pa.Field(gt=0, nullable=True)
    """Factor of the loss of the pair in preference training, if known."""
    agreement: Series[float] = pa.Field(ge=0, le=1, nullable=True)
    """Probability that a random person prefers `chosen`, if known."""
    chosen_rating: Series[float] = pa.Field(nullable=True)
    """Rating of `chosen`, if known."""
    rejected_rating: Series[float] = pa.Field(nullable=True)
    """Rating of `rejected`, if known."""

    class Config:
        """Unknown columns and missing columns are errors. No value is converted."""

        strict = True


class RawPairs(Fields):
    """One pair per row, or a row of the source that cannot be converted, with `rule` and `reason`."""

    file: Series[str]
    """The file, or data set and split, that contains the row."""
    line: Series[int]
    """Its line in the file, or its number in Parquet, JSON arrays and data sets; from 1."""
    original: Series[str]
    """The row as it is in a JSONL file; for other formats as JSON."""
    rule: Series[str] = pa.Field(nullable=True)
    """The rule that the row breaks, null if the conversion succeeded."""
    reason: Series[str] = pa.Field(nullable=True)
    """How the row breaks the rule."""

    @pa.dataframe_check(name="a pair, or a rule that it breaks", ignore_na=False)
    def _complete(cls, table: pd.DataFrame) -> Series[bool]:
        pair = table[["id", "prompt", "chosen", "rejected", "split", "source"]].notna().all(axis=1)
        return cast("Series[bool]", pair | table["rule"].notna() & table["reason"].notna())


class RawDemonstrations(RawPairs):
    """One demonstration per row, with `rejected` null, or a row of the source that cannot be converted."""

    @pa.dataframe_check(name="a pair, or a rule that it breaks", ignore_na=False)
    def _complete(cls, table: pd.DataFrame) -> Series[bool]:
        found = table[["id", "prompt", "chosen", "split", "source"]].notna().all(axis=1) & table["rejected"].isna()
        return cast("Series[bool]", found | table["rule"].notna() & table["reason"].notna())


class RawLabelled(RawPairs):
    """One labelled row per row, or a row of the source that cannot be converted.

    The completion is in `chosen` if it is desirable, and in `rejected` if not. The other one is null.
    """

    @pa.dataframe_check(name="a labelled row, or a rule that it breaks", ignore_na=False)
    def _complete(cls, table: pd.DataFrame) -> Series[bool]:
        known = table[["id", "prompt", "split", "source"]].notna().all(axis=1)
        one = table["chosen"].notna() ^ table["rejected"].notna()
        return cast("Series[bool]", known & one | table["rule"].notna() & table["reason"].notna())


class Pairs(Fields):
    """One valid pair per row: the training table and the held-out table."""

    id: Series[str] = pa.Field(unique=True)
    prompt: Series[str]
    chosen: Series[str] = pa.Field(str_contains=r"\S")
    rejected: Series[str] = pa.Field(str_contains=r"\S")
    split: Series[str] = pa.Field(isin=["train", "eval"])
    source: Series[str]

    @pa.dataframe_check(name="chosen and rejected differ", ignore_na=False)
    def _differ(cls, table: pd.DataFrame) -> Series[bool]:
        return cast("Series[bool]", table["chosen"].str.strip() != table["rejected"].str.strip())


class Demonstrations(Fields):
    """One valid demonstration per row: the completion is in `chosen`, and `rejected` is null."""

    id: Series[str] = pa.Field(unique=True)
    prompt: Series[str]
    chosen: Series[str] = pa.Field(str_contains=r"\S")
    split: Series[str] = pa.Field(isin=["train"])
    source: Series[str]

    @pa.dataframe_check(name="rejected is null", ignore_na=False)
    def _single(cls, table: pd.DataFrame) -> Series[bool]:
        return cast("Series[bool]", table["rejected"].isna())


class Labelled(Fields):
    """One valid labelled row per row, with its completion in `chosen` if it is desirable, else in `rejected`."""

    id: Series[str] = pa.Field(unique=True)
    prompt: Series[str]
    chosen: Series[str] = pa.Field(str_contains=r"\S", nullable=True)
    rejected: Series[str] = pa.Field(str_contains=r"\S", nullable=True)
    split: Series[str] = pa.Field(isin=["train", "eval"])
    source: Series[str]

    @pa.dataframe_check(name="one completion", ignore_na=False)
    def _one(cls, table: pd.DataFrame) -> Series[bool]:
        return cast("Series[bool]", table["chosen"].notna() ^ table["rejected"].notna())


KINDS: dict[str, tuple[type[RawPairs], type[Fields]]] = {
    "pairs": (RawPairs, Pairs),
    "demonstrations": (RawDemonstrations, Demonstrations),
    "labelled": (RawLabelled, Labelled),
}
"""Schemas of the raw table and of the accepted rows, by the kind of rows."""


def write_empty(path: Path, schema: pyarrow.Schema) -> None:
    """Write a table without rows, atomically."""
    with atomic_write(path) as tmp:
        pyarrow.parquet.write_table(schema.empty_table(), tmp)


def as_columns(pair: dict[str, Any]) -> dict[str, Any]:
    """Return a pair as a row of these tables: tools, tool calls and template variables become JSON."""
    turns = {name: pair[name] and [_turn(turn) for turn in pair[name]] for name in TURN_COLUMNS}
    objects = {name: pair[name] and json.dumps(pair[name], ensure_ascii=False) for name in JSON_COLUMNS}
    return {**pair, **turns, **objects}


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    return turn if calls is None else {**turn, "tool_calls": json.dumps(calls, ensure_ascii=False)}


def validate_schema(model: type[pa.DataFrameModel], table: pd.DataFrame, origin: str) -> pd.DataFrame:
    """Check a table against a model of this module. Environment variables cannot disable the check.

    Raises:
        InputError: names `origin` and up to ten violations, each with row, field and check.
    """
    try:
        with config_context(validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA):
            return model.validate(table, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases.drop_duplicates(["index", "check", "column"])
        lines = [f"{origin}: {len(cases)} violations of the schema `{model.__name__}`"]
        for case in cases.head(10).itertuples():
            row = "the table" if pd.isna(case.index) else f"row {int(case.index) + 1}"
            lines.append(f"  {row}, field {case.column!r}: {case.check} ({str(case.failure_case)[:60]!r})")
        raise InputError("\n".join(lines)) from errors
