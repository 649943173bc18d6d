"""Raw tables and tokenizers that validation rejects."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dpo.common.errors import InputError
from dpo.data.schema import RAW_PAIRS_SCHEMA
from tests.support.models import bare_tokenizer
from tests.support.validation import ROWS, check, row, validated


def tamper(folder, **columns):
    check(folder, ROWS)
    table = pq.read_table(folder / "raw_pairs.parquet").to_pandas()
    table = table.assign(**columns)
    table.to_parquet(folder / "raw_pairs.parquet")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"split": "test"}, "field 'split'"),
        ({"chosen": None}, "a pair, or a rule that it breaks"),
        ({"weight": -1.0}, "field 'weight'"),
        ({"line": "one"}, "field 'line'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_raw_table_that_violates_its_schema_is_rejected(tmp_path, columns, words):
    tamper(tmp_path, **columns)
    with pytest.raises(InputError) as error:
        validated(tmp_path)
    assert str(tmp_path / "raw_pairs.parquet") in str(error.value)
    assert words in str(error.value)


def test_schema_errors_name_the_row_in_the_full_table(tmp_path, monkeypatch):
    check(tmp_path, ROWS)
    table = pq.read_table(tmp_path / "raw_pairs.parquet").to_pandas()
    table.loc[9, "split"] = "test"
    table.to_parquet(tmp_path / "raw_pairs.parquet", row_group_size=6)
    with pytest.raises(InputError, match="row 10, field 'split'"):
        validated(tmp_path)


def write_garbage(path):
    path.write_bytes(b"not Parquet")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)


def remove_rows(path):
    pq.write_table(RAW_PAIRS_SCHEMA.empty_table(), path)


@pytest.mark.parametrize("damage", [write_garbage, truncate, corrupt, remove_rows, Path.unlink])
def test_a_damaged_raw_table_is_rejected_with_its_name(tmp_path, damage):
    check(tmp_path, ROWS)
    damage(tmp_path / "raw_pairs.parquet")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'raw_pairs.parquet'}: n")):
        validated(tmp_path)


def test_a_folder_without_a_tokenizer_is_rejected_with_its_name(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=re.escape(f"cannot load '{tmp_path / 'model'}'")):
        check(tmp_path, ROWS, tokenizer=tmp_path / "model")


def test_a_pair_that_the_tokenizer_cannot_encode_is_reported_with_its_rows(tmp_path):
    tokenizer = bare_tokenizer()
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"rows 1 to 12: .*an empty prompt needs a tokenizer"):
        check(tmp_path, [*ROWS[:11], row(11, prompt="")], tokenizer=tmp_path / "bare")
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    tokenizer.save_pretrained(tmp_path / "strict")
