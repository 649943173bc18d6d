"""The canonical preference table: what every later stage may rely on."""

from typing import cast

import pandas as pd
import pandera.pandas as pa
from pandera.config import config_context
from pandera.typing.pandas import Series

from dpo.errors import InputError

SHOWN_FAULTS = 10


class Pairs(pa.DataFrameModel):
    """One preference pair a row."""

    id: Series[str] = pa.Field(unique=True)
    """Stable name of the pair."""
    prompt: Series[str]
    """What the user asks; one turn, without any chat template."""
    chosen: Series[str] = pa.Field(str_matches=r"\S")
    """The completion that people preferred."""
    rejected: Series[str] = pa.Field(str_matches=r"\S")
    """The other completion."""
    split: Series[str] = pa.Field(isin=["train", "eval"])
    """`eval` rows are never trained on."""
    source: Series[str]
    """Where the pair comes from; metrics can be read by source."""
    agreement: Series[float] = pa.Field(ge=0, le=1, nullable=True)
    """Probability that a random person prefers `chosen`, where known."""
    chosen_rating: Series[float] = pa.Field(nullable=True)
    """Mean human rating of `chosen`, where known."""
    rejected_rating: Series[float] = pa.Field(nullable=True)
    """Mean human rating of `rejected`, where known."""

    class Config:
        """Columns outside the contract are faults, and so are missing ones."""

        strict = True
        coerce = False

    @pa.dataframe_check(name="chosen and rejected differ", ignore_na=False)
    def _differ(cls, table: pd.DataFrame) -> Series[bool]:
        return cast("Series[bool]", table["chosen"].str.strip() != table["rejected"].str.strip())

    @pa.dataframe_check(name="prompt is in one split only", ignore_na=False)
    def _apart(cls, table: pd.DataFrame) -> Series[bool]:
        return cast("Series[bool]", table.groupby("prompt")["split"].transform("nunique") == 1)

    @pa.dataframe_check(name="no eval text was seen in training", ignore_na=False)
    def _unseen(cls, table: pd.DataFrame) -> Series[bool]:
        train = table[table["split"] == "train"]
        seen = set(train["chosen"]) | set(train["rejected"])
        leaked = table["chosen"].isin(seen) | table["rejected"].isin(seen)
        return cast("Series[bool]", ~(leaked & (table["split"] == "eval")))


def check(table: pd.DataFrame, origin: str) -> pd.DataFrame:
    """Hold a table against the contract.

    Args:
        table: candidate canonical table.
        origin: the file it came from, for messages.

    Returns:
        The table, unchanged.

    Raises:
        InputError: names the file and up to ten faults, each with its row, id, field and rule; or a split is
            empty.
    """
    try:
        with config_context(validation_enabled=True):  # PANDERA_VALIDATION_ENABLED=False must not open the gate
            Pairs.validate(table, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        cases["column"] = cases["column"].where(cases["schema_context"] == "Column", "pair")
        cases = cases.drop_duplicates(["index", "check", "column"])
        lines = [f"{origin}: {len(cases)} faults"]
        for case in cases.head(SHOWN_FAULTS).itertuples():
            if pd.isna(case.index):
                lines.append(f"  column '{case.failure_case}': {case.check}; add, rename or remove the column")
                continue
            pair = table["id"].iloc[int(case.index)] if "id" in table else "?"
            lines.append(
                f"  row {int(case.index)} (id {pair}), field '{case.column}': breaks the rule '{case.check}'; "
                "mend or remove the row"
            )
        raise InputError("\n".join(lines)) from errors
    for split in ("train", "eval"):
        if not (table["split"] == split).any():
            raise InputError(
                f"{origin}: no pair is in split '{split}'; bring more prompts or a `split` column with both values"
            )
    return table
