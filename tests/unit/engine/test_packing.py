"""Packed batches compared with a manual layout, and batches under a token budget."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.engine.packing import budget_batches, pack
from dpo.engine.tokenization import TokenRow
from tests.support.examples import examples

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
fast = examples(150)


def test_pack_returns_the_expected_layout():
    rows = [
        TokenRow("a", (10, 11), ((20, 21, 2), (30, 2))),
        TokenRow("b", (12,), ((40,), (50, 51))),
    ]
    batch = pack(rows)
    # position:  0   1 | 2   3   4 | 5   6 || 7 | 8 | 9  10
    # part:      prompt| chosen    | reject|| p | c | rejected
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 2, 30, 2, 12, 40, 50, 51]]
    # Both completions of a row continue from its prompt. Each row starts at 0.
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 1, 2]]
    assert batch.layout == ((2, (3, 2)), (1, (1, 2)))
    # The first token of a completion is predicted from the last prompt token (1 or 7), every other token from the
    # previous one. The last token of a completion predicts nothing.
    assert batch.logit_positions.tolist() == [1, 2, 3, 1, 5, 7, 7, 9]
    assert batch.targets.tolist() == [20, 21, 2, 30, 2, 40, 50, 51]
    assert batch.completion_index.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert batch.ids == ("a", "b")
    assert batch.completions == 4
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.logit_positions)} == {torch.int64}


def test_row_tokens_include_the_prompt_once():
    row = TokenRow("a", (1, 2, 3), ((4, 5), (6,)))
    assert row.tokens == 6 == pack([row]).input_ids.numel()
    assert row.completion_tokens == 3 == len(pack([row]).targets)


@pytest.mark.parametrize("row", [TokenRow("bad", (), ((1,), (2,))), TokenRow("bad", (1,), ((1,), ()))])
def test_an_empty_prompt_or_completion_is_an_error_with_the_row_id(row):
    with pytest.raises(ValueError, match=r"row 'bad'.*at least one token"):
        pack([TokenRow("good", (1,), ((2,), (3,))), row])


def test_budget_batches_returns_the_expected_batches():
    # 3 + 4 = 7. 2 + 9 exceeds 7. 9 exceeds 7 and gets its own batch.
    assert budget_batches([3, 4, 2, 9, 1, 1], 7) == [[0, 1], [2], [3], [4, 5]]
    assert budget_batches([], 7) == []


@fast
@given(LENGTHS, st.integers(1, 100))
def test_budget_batches_are_minimal_and_keep_order_and_budget(lengths, budget):
    batches = budget_batches(lengths, budget)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in batch) <= budget or len(batch) == 1 for batch in batches)
    for batch, following in itertools.pairwise(batches):
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > budget
