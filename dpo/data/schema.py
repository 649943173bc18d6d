"""The canonical preference table: what every later stage may rely on, and what is checked on the way there.

`Candidates` is what the stage `ingest` writes: every row of the source, sound or not, with the place where it
stood. `Pairs` is what the stage `validate` lets through.
"""

from typing import cast

import pandas as pd
import pandera.pandas as pa
import pyarrow
from pandera.config import ValidationDepth, config_context
from pandera.typing.pandas import Series

from dpo.common.errors import InputError

SHOWN_FAULTS = 10

TURN = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
TEXT, NUMBER = pyarrow.string(), pyarrow.float64()
PAIR_FIELDS = {
    "id": TEXT,
    "prompt": TEXT,
    "turns": pyarrow.list_(TURN),
    "chosen": TEXT,
    "rejected": TEXT,
    "split": TEXT,
    "source": TEXT,
    "weight": NUMBER,
    "agreement": NUMBER,
    "chosen_rating": NUMBER,
    "rejected_rating": NUMBER,
    "timestamp": TEXT,
}
PLACE_FIELDS = {"file": TEXT, "line": pyarrow.int64(), "original": TEXT}
FAULT_FIELDS = {"rule": TEXT, "reason": TEXT}
PAIRS_SCHEMA = pyarrow.schema(PAIR_FIELDS)
RAW_PAIRS_SCHEMA = pyarrow.schema({**PAIR_FIELDS, **PLACE_FIELDS, **FAULT_FIELDS})
"""Also the schema of the quarantine, where `rule` and `reason` are never null."""


class Fields(pa.DataFrameModel):
    """The columns that both tables have."""

    id: Series[str] = pa.Field(nullable=True)
    """Stable name of the pair: its own, or a hash of its texts."""
    prompt: Series[str] = pa.Field(nullable=True)
    """What is asked, without any chat template; of a conversation, its transcript."""
    turns: Series[object] = pa.Field(nullable=True)
    """The prompt's turns as {role, content} where it is more than one user turn, else null."""
    chosen: Series[str] = pa.Field(nullable=True)
    """The completion that people preferred."""
    rejected: Series[str] = pa.Field(nullable=True)
    """The other completion."""
    split: Series[str] = pa.Field(isin=["train", "eval"], nullable=True)
    """`eval` rows are never trained on."""
    source: Series[str] = pa.Field(nullable=True)
    """Where the pair comes from; metrics can be read by source."""
    weight: Series[float] = pa.Field(gt=0, nullable=True)
    """Importance of the pair, where known; kept, not used in training."""
    agreement: Series[float] = pa.Field(ge=0, le=1, nullable=True)
    """Probability that a random person prefers `chosen`, where known."""
    chosen_rating: Series[float] = pa.Field(nullable=True)
    """Rating of `chosen`, where known."""
    rejected_rating: Series[float] = pa.Field(nullable=True)
    """Rating of `rejected`, where known."""
    timestamp: Series[str] = pa.Field(nullable=True)
    """When the preference was given, as the source writes it."""

    class Config:
        """Columns outside the contract are faults, and so are missing ones."""

        strict = True
        coerce = False


class RawPairs(Fields):
    """One pair a row, or one row of which no pair could be made; then `rule` and `reason` tell why."""

    file: Series[str]
    """The file, or data set and split, that the row stood in."""
    line: Series[int]
    """Its line there; in Parquet, JSON arrays and data sets its number; from 1."""
    original: Series[str]
    """The row as it stood there; in other formats than JSONL as JSON."""
    rule: Series[str] = pa.Field(nullable=True)
    """The rule that the row breaks, null if it breaks none so far."""
    reason: Series[str] = pa.Field(nullable=True)
    """How it breaks the rule."""

    @pa.dataframe_check(name="a pair, or a rule that it breaks", ignore_na=False)
    def _whole(cls, table: pd.DataFrame) -> Series[bool]:
        pair = table[["id", "prompt", "chosen", "rejected", "split", "source"]].notna().all(axis=1)
        return cast("Series[bool]", pair | table["rule"].notna() & table["reason"].notna())


class Pairs(Fields):
    """One sound pair a row: the training table and the held-out table."""

    id: Series[str] = pa.Field(unique=True)
    prompt: Series[str]
    chosen: Series[str] = pa.Field(str_contains=r"\S")
    rejected: Series[str] = pa.Field(str_contains=r"\S")
    split: Series[str] = pa.Field(isin=["train", "eval"])
    source: Series[str]

    @pa.dataframe_check(name="chosen and rejected differ", ignore_na=False)
    def _differ(cls, table: pd.DataFrame) -> Series[bool]:
        return cast("Series[bool]", table["chosen"].str.strip() != table["rejected"].str.strip())


def hold(model: type[pa.DataFrameModel], table: pd.DataFrame, origin: str) -> pd.DataFrame:
    """Hold a table against a model of this module; no environment variable opens this gate.

    Raises:
        InputError: names `origin` and up to ten breaches, each with its row, field and rule.
    """
    try:
        with config_context(validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA):
            return model.validate(table, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases.drop_duplicates(["index", "check", "column"])
        lines = [f"{origin}: {len(cases)} breaches of the contract `{model.__name__}`"]
        for case in cases.head(SHOWN_FAULTS).itertuples():
            row = "the table" if pd.isna(case.index) else f"row {int(case.index) + 1}"
            lines.append(f"  {row}, field {case.column!r}: {case.check} ({str(case.failure_case)[:60]!r})")
        raise InputError("\n".join(lines)) from errors
