"""Learning rates against their closed forms."""

import math

import pytest

from dpo.training.optimizers import schedule_factor


def rates(decay, warmup_ratio, steps):
    return [schedule_factor(decay, warmup_ratio, step, steps) for step in range(steps)]


def test_rates_by_hand():
    assert rates("constant", 0.0, 3) == [1, 1, 1]
    assert rates("constant", 0.5, 4) == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates("linear", 0.0, 4) == [1, 0.75, 0.5, 0.25]
    assert rates("linear", 0.2, 5) == [0.5, 1, 0.75, 0.5, 0.25]
    assert rates("cosine", 0.0, 4) == pytest.approx([(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)])


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 101])
def test_every_step_trains_and_one_has_the_full_rate(decay, warmup_ratio, steps):
    found = rates(decay, warmup_ratio, steps)
    assert all(0 < rate <= 1 for rate in found)
    assert max(found) == 1
    peak = found.index(1)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
