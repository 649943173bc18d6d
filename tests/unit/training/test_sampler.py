"""Every split of rows into steps and micro-batches keeps rows, step sizes and the token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.training.sampler import StepSampler, balance
from tests.support.examples import examples

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
fast = examples(150)


def test_balance_by_hand():
    # Longest first, each to the lightest group: 9 | 7 | 7+5 | 9+4 | 12+1.
    assert balance([0, 1, 2, 3, 4], [5, 9, 1, 7, 4], 2) == [[1, 4], [3, 0, 2]]
    assert balance([0, 1], [3, 3], 5) == [[0], [1]]


@fast
@given(LENGTHS, st.integers(1, 50))
def test_balance_keeps_all_rows_leaves_no_group_empty_and_equalizes_tokens(lengths, bins):
    groups = balance(range(len(lengths)), lengths, bins)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert len(groups) == min(bins, len(lengths))
    assert all(groups)
    loads = [sum(lengths[i] for i in group) for group in groups]
    assert max(loads) - min(loads) <= max(lengths)


@fast
@given(LENGTHS, st.integers(1, 12), st.integers(1, 150), st.integers(0, 5))
def test_every_epoch_has_each_row_once_in_exact_steps_under_the_budget(lengths, rows_per_step, budget, seed):
    sampler = StepSampler(
        lengths, rows_per_step=rows_per_step, max_tokens_per_microbatch=budget, epochs=2, seed=seed
    )
    for epoch in range(2):
        steps = sampler.steps(epoch)
        batches = [batch for step in steps for batch in step]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(len(step) == sampler.accumulation for step in steps[:-1])
        sizes = [sum(map(len, step)) for step in steps]
        full, rest = divmod(len(lengths), min(rows_per_step, len(lengths)))
        assert sizes == [min(rows_per_step, len(lengths))] * full + [rest] * bool(rest)
        assert all(sum(lengths[i] for i in batch) <= budget or len(batch) == 1 for batch in batches)


@fast
@given(LENGTHS, st.integers(1, 12), st.integers(1, 150), st.integers(1, 150))
def test_the_token_budget_never_moves_a_row_to_another_step(lengths, rows_per_step, budget, other):
    def rows_of_steps(max_tokens_per_microbatch):
        sampler = StepSampler(
            lengths,
            rows_per_step=rows_per_step,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            epochs=1,
            seed=0,
        )
        return [sorted(i for batch in step for i in batch) for step in sampler.steps(0)]

    assert rows_of_steps(budget) == rows_of_steps(other)


def test_the_number_of_micro_batches_is_the_smallest_under_the_budget():
    lengths = [10] * 24
    for budget, accumulation in ((80, 1), (79, 2), (40, 2), (39, 3), (20, 4), (10, 8), (1, 8)):
        sampler = StepSampler(lengths, rows_per_step=8, max_tokens_per_microbatch=budget, epochs=1, seed=0)
        assert sampler.accumulation == accumulation
        assert [len(step) for step in sampler.steps(0)] == [accumulation] * 3


def test_the_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = StepSampler(
            range(1, 101), rows_per_step=4, max_tokens_per_microbatch=10_000, epochs=3, seed=seed
        )
        return sampler.steps(epoch)

    assert order(1, 0) == order(1, 0)
    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in (1, 2, 3) for epoch in (0, 1, 2)}) == 9


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        StepSampler([], rows_per_step=4, max_tokens_per_microbatch=10, epochs=1, seed=0)
