"""Packed batches compared with a manual layout, and invariants of steps and micro-batches."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.engine.packing import StepSampler, TokenRow, balance, budget_batches, pack

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
fast = settings(max_examples=150, deadline=None)


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


def test_balance_returns_the_expected_groups():
    # Longest first, each to the smallest group: 9 | 7 | 7+5 | 9+4 | 12+1.
    assert balance([0, 1, 2, 3, 4], [5, 9, 1, 7, 4], 2) == [[1, 4], [3, 0, 2]]
    assert balance([0, 1], [3, 3], 5) == [[0], [1]]


@fast
@given(LENGTHS, st.integers(1, 50))
def test_balance_keeps_all_rows_in_nonempty_groups_of_similar_size(lengths, bins):
    groups = balance(range(len(lengths)), lengths, bins)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert len(groups) == min(bins, len(lengths))
    assert all(groups)
    loads = [sum(lengths[i] for i in group) for group in groups]
    assert max(loads) - min(loads) <= max(lengths)


def steps_of(sampler, lengths):
    """Group the micro-batches of one epoch into optimizer steps, as training does."""
    batches = list(sampler)
    full = len(lengths) // sampler.rows_per_step * sampler.accumulation
    steps = [batches[i : i + sampler.accumulation] for i in range(0, full, sampler.accumulation)]
    return [*steps, batches[full:]] if batches[full:] else steps


@fast
@given(LENGTHS, st.integers(1, 12), st.integers(1, 150), st.integers(0, 5))
def test_every_epoch_has_every_row_once_in_exact_steps_within_the_budget(lengths, rows_per_step, budget, seed):
    sampler = StepSampler(
        lengths, rows_per_step=rows_per_step, max_tokens_per_microbatch=budget, epochs=2, seed=seed
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        sizes = [sum(map(len, step)) for step in steps_of(sampler, lengths)]
        full, rest = divmod(len(lengths), min(rows_per_step, len(lengths)))
        assert sizes == [min(rows_per_step, len(lengths))] * full + [rest] * bool(rest)
        assert all(sum(lengths[i] for i in batch) <= budget or len(batch) == 1 for batch in batches)


@fast
@given(LENGTHS, st.integers(1, 12), st.integers(1, 150), st.integers(1, 150))
def test_steps_do_not_depend_on_the_token_budget(lengths, rows_per_step, budget, other):
    def rows_of_steps(max_tokens_per_microbatch):
        sampler = StepSampler(
            lengths,
            rows_per_step=rows_per_step,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            epochs=1,
            seed=0,
        )
        return [sorted(i for batch in step for i in batch) for step in steps_of(sampler, lengths)]

    assert rows_of_steps(budget) == rows_of_steps(other)


def test_accumulation_is_the_smallest_that_fits_the_budget():
    lengths = [10] * 24
    for budget, accumulation in ((80, 1), (79, 2), (40, 2), (39, 3), (20, 4), (10, 8), (1, 8)):
        sampler = StepSampler(lengths, rows_per_step=8, max_tokens_per_microbatch=budget, epochs=1, seed=0)
        assert sampler.accumulation == accumulation
        assert len(sampler) == 3 * accumulation


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = StepSampler(
            range(1, 101), rows_per_step=4, max_tokens_per_microbatch=10_000, epochs=3, seed=seed
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in (1, 2, 3) for epoch in (0, 1, 2)}) == 9


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no rows"):
        StepSampler([], rows_per_step=4, max_tokens_per_microbatch=10, epochs=1, seed=0)
