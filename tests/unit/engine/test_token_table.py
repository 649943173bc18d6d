"""Token tables: rows, lengths and digests of memory-mapped files, stale tables, and interrupted writes."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from dpo.common.errors import InputError
from dpo.engine import token_table
from dpo.engine.packing import pack
from dpo.engine.token_table import TokenTable, open_table, write_table
from dpo.engine.tokenization import TokenRow, encode_pairs
from tests.support.training import make_pairs

MAX_LENGTH = 200
ROWS = [
    TokenRow("one", (1, 2), ((3, 4), (5,))),
    TokenRow("two", (6,), ((7, 8, 9, 10), (11, 12, 13)), ((1, 2), ())),
    TokenRow("three", (14, 15, 16), ((17,), (18,))),
]


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def written(tmp_path, tokenizer, monkeypatch):
    """The paths of 30 pairs and of their table, which has several record batches."""
    monkeypatch.setattr(token_table, "PAIRS_AT_ONCE", 7)
    pairs, folder = tmp_path / "pairs.parquet", tmp_path / "tokens"
    pd.DataFrame(make_pairs(30)).to_parquet(pairs)
    write_table(folder, pairs, tokenizer, MAX_LENGTH)
    return pairs, folder


def plain(rows):
    return [row.to_json() for row in rows]


def test_rows_of_the_file_equal_encoded_pairs_and_are_views_of_it(written, tokenizer):
    pairs, folder = written
    rows = encode_pairs(make_pairs(30), tokenizer, MAX_LENGTH)
    before = pa.total_allocated_bytes()
    table = open_table(folder, pairs, tokenizer, MAX_LENGTH)
    read = list(table)
    assert pa.total_allocated_bytes() - before < 2000, "ids are not copied"
    assert plain(read) == plain(rows)
    assert read[3].prompt.dtype == np.int32
    assert not read[3].prompt.flags.owndata
    assert [row.digest for row in read] == [row.digest for row in rows]
    assert table.ids == [row.id for row in rows]
    assert table.tokens == [row.tokens for row in rows]
    assert table.digest == hashlib.sha256(b"".join(row.digest for row in rows)).hexdigest()
    packed, expected = pack(read), pack(rows)
    for name, value in vars(expected).items():
        found = getattr(packed, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_selected_rows_and_first_completions():
    table = TokenTable.of(ROWS)
    assert TokenTable.of(table) is table
    part = table.select([2, 1])
    assert plain(part) == plain([ROWS[2], ROWS[1]]) == plain(part[:])
    assert (part.ids, part.tokens, part.digest) == (["three", "two"], [5, 8], TokenTable.of(part).digest)
    assert part.select([1])[-1].id == "two"
    first = part.first_completions(1)
    expected = [dataclasses.replace(row, completions=row.completions[:1], context=row.context[:1]) for row in part]
    assert plain(first) == plain(expected)
    assert first.tokens == [row.tokens for row in expected] == [4, 5]


def test_a_table_without_rows(tmp_path, tokenizer):
    pd.DataFrame(make_pairs(1)).iloc[:0].to_parquet(tmp_path / "pairs.parquet")
    write_table(tmp_path / "tokens", tmp_path / "pairs.parquet", tokenizer, MAX_LENGTH)
    table = open_table(tmp_path / "tokens", tmp_path / "pairs.parquet", tokenizer, MAX_LENGTH)
    assert (len(table), table.tokens, table.ids) == (0, [], [])


def test_other_programs_read_the_file_and_writing_again_gives_the_same_bytes(written, tokenizer):
    pairs, folder = written
    data = Dataset.from_file(str(folder / "table.arrow"))
    assert data[29]["prompt"] == list(encode_pairs(make_pairs(30), tokenizer, MAX_LENGTH)[29].prompt)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_table(folder, pairs, tokenizer, MAX_LENGTH)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert set(before) == {"table.arrow", "manifest.json"}


def other_pairs(pairs, folder, tokenizer):
    pd.DataFrame(make_pairs(31)).to_parquet(pairs)


def other_tokenizer(pairs, folder, tokenizer):
    tokenizer.add_tokens(["film 7"])


def other_end(pairs, folder, tokenizer):
    tokenizer.eos_token = tokenizer.pad_token = "a"


def other_template(pairs, folder, tokenizer):
    tokenizer.chat_template += " "


def altered(pairs, folder, tokenizer):
    content = bytearray((folder / "table.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "table.arrow").write_bytes(content)


def cut(pairs, folder, tokenizer):
    content = (folder / "table.arrow").read_bytes()
    (folder / "table.arrow").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_pairs, "pairs"),
        (other_tokenizer, "tokenizer"),
        (other_end, "tokenizer"),
        (other_template, "template"),
        (altered, "table"),
        (cut, "table"),
    ],
)
def test_a_table_of_other_inputs_is_refused(written, tokenizer, change, named):
    change(*written, tokenizer)
    with pytest.raises(
        InputError, match=f"tokens: stale token table, refused: {named} differ .* stage `tokens` again"
    ):
        open_table(written[1], written[0], tokenizer, MAX_LENGTH)


def test_a_table_of_another_length_or_version_and_a_missing_one_are_refused(written, tokenizer, monkeypatch):
    pairs, folder = written
    with pytest.raises(InputError, match="refused: max_length differ"):
        open_table(folder, pairs, tokenizer, MAX_LENGTH + 1)
    monkeypatch.setattr(token_table, "ENGINE_VERSION", -1)
    with pytest.raises(InputError, match="refused: engine differ"):
        open_table(folder, pairs, tokenizer, MAX_LENGTH)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="no complete token table"):
        open_table(folder, pairs, tokenizer, MAX_LENGTH)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"no complete token table .*run the stage `tokens`"):
        open_table(folder, pairs, tokenizer, MAX_LENGTH)


def test_a_tokenizer_that_was_saved_again_can_open_the_table(written, tokenizer, tmp_path):
    """The reference has the base model's tokenizer; saving changes files of a tokenizer, but not its tokens."""
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    again("padded", padding="max_length", max_length=4)
    again.save_pretrained(tmp_path / "again")
    before, after = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("saved", "again"))
    assert before != after
    table = open_table(written[1], written[0], AutoTokenizer.from_pretrained(tmp_path / "again"), MAX_LENGTH)
    assert len(table) == 30


def test_an_interrupted_write_leaves_the_table_before_it(written, tokenizer, monkeypatch):
    pairs, folder = written
    before = (folder / "table.arrow").read_bytes()
    calls = []

    def encode(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_pairs(*arguments)

    monkeypatch.setattr(token_table, "encode_pairs", encode)
    with pytest.raises(KeyboardInterrupt):
        write_table(folder, pairs, tokenizer, MAX_LENGTH)
    assert (folder / "table.arrow").read_bytes() == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["pairs.parquet", "tokens"]
