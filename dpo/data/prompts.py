"""Files of prompts without completions, in any layout that `dpo validate` reads."""

from pathlib import Path
from typing import Any

import pandas as pd

from dpo.common.errors import InputError
from dpo.data.formats import normalize, prompt_fields
from dpo.data.readers import OWN_DATA, read_files
from dpo.data.reading import TOOLS, VARIABLES, Reading, read_template_kwargs, read_tools
from dpo.data.schema import TURN_COLUMNS, as_columns
from dpo.data.turns import ROLES, Fields, RowError

METADATA = ("id", "split", "source")
"""Fields of a prompt that are copied and that the model does not read."""
COLUMNS = ["prompt", "turns", "tools", "chat_template_kwargs", "source"]
"""Columns of a canonical table that hold a prompt, and its source."""


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the prompts of a file: `fields` of the row, `turns`, `tools`, `variables`, and `where` it is.

    Raises:
        InputError: a row is not a prompt, has another field, or ends with the assistant's turn.
    """
    rows = []
    for raw in read_files([str(path)]):
        where = f"{raw.file}, line {raw.line}"
        if raw.row is None:
            raise InputError(f"{where}: {raw.violation[1] if raw.violation else 'unreadable'}; correct the row")
        reading = Reading(Fields(raw.row), ROLES)
        try:
            turns = reading.prompt()
            tools = read_tools(reading.fields.get(*TOOLS))
            variables = read_template_kwargs(reading.fields.get(*VARIABLES))
        except RowError as error:
            raise InputError(f"{where}: {error}; correct the row") from error
        others = sorted({*reading.fields.unread_names(), *reading.unread} - {*METADATA})
        if others:
            raise InputError(f"{where}: field '{others[0]}' is not a part of a prompt; remove it")
        if turns[-1]["role"] == "assistant":
            raise InputError(f"{where}: the prompt ends with the assistant's turn; remove that turn")
        rows.append({"fields": raw.row, "turns": turns, "tools": tools, "variables": variables, "where": where})
    if not rows:
        raise InputError(f"{path}: no prompts; add one row per prompt")
    return rows


def prompt_table(name: str, trained: pd.Series) -> pd.DataFrame:
    """Return the prompts of the file `evaluate.prompts` as the columns `COLUMNS` of a canonical table.

    `trained` has the prompts of the training pairs.

    Raises:
        InputError: the file is not under `data/own/`, a row is not a prompt, or a training pair has its prompt,
            regardless of case and space.
    """
    path = Path(name)
    if OWN_DATA.absolute() not in path.absolute().parents or ".." in path.parts:
        raise InputError(
            f"params.yaml: evaluate.prompts: {name} is not under {OWN_DATA}/; move it to {OWN_DATA / path.name}"
        )
    known = set(trained.map(normalize))
    rows = []
    for row in read_prompts(path):
        try:
            columns = prompt_fields(row["turns"], is_transcript=False)
        except RowError as error:
            raise InputError(f"{row['where']}: {error}; correct the row") from error
        if normalize(columns["prompt"]) in known:
            raise InputError(f"{row['where']}: a training pair has this prompt; remove one of them")
        given = {"tools": row["tools"], "chat_template_kwargs": row["variables"]}
        source = row["fields"].get("source") or path.name
        rows.append(as_columns({**dict.fromkeys(TURN_COLUMNS), **columns, **given, "source": source}))
    return pd.DataFrame(rows, columns=COLUMNS)
