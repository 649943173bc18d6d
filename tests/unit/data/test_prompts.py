"""Prompts of a file for the evaluation."""

import json

import pandas as pd
import pytest

from dpo.common.errors import InputError
from dpo.data.prompts import COLUMNS, prompt_table
from dpo.engine.chat import prompt_of
from tests.support.models import chat_tokenizer

TRAINED = pd.Series(["A trained prompt."])


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return a function that writes rows to a file under data/own and reads it as prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/own").mkdir(parents=True)

    def read(*rows, name="data/own/prompts.jsonl"):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return prompt_table(name, TRAINED)

    return read


def test_prompts_become_columns_that_the_model_reads(table, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And books?"}]
    found = table({"prompt": "Films?", "source": "mine"}, {"messages": turns})
    assert list(found.columns) == COLUMNS
    assert found["source"].tolist() == ["mine", "prompts.jsonl"]
    found.to_parquet(tmp_path / "table.parquet")
    stored = pd.read_parquet(tmp_path / "table.parquet").to_dict("records")
    tokenizer = chat_tokenizer()
    assert [prompt_of(row, tokenizer) for row in stored] == ["Films?", turns]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": " a  TRAINED prompt."}, "line 2: a training pair has this prompt; remove one of them"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "line 2: field '.*' is not a part of a prompt"),
        ({"text": "p"}, "line 2: "),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "line 2: "),
    ],
)
def test_a_row_that_is_no_separate_prompt_is_an_error_with_file_and_line(table, row, fault):
    with pytest.raises(InputError, match=rf"data/own/prompts\.jsonl, {fault}"):
        table({"prompt": "Films?"}, row)


def test_a_file_elsewhere_is_an_error(table):
    with pytest.raises(InputError, match=r"evaluate\.prompts: prompts\.jsonl is not under data/own/; move it to"):
        table({"prompt": "p"}, name="prompts.jsonl")
