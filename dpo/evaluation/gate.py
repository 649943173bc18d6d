"""The promotion gate: the evidence that a comparison needs, and the held-out prompts that it uses."""

import hashlib
import math
from collections.abc import Sequence, Set

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dpo.evaluation.settings import PromoteSettings


def significance_level(comparison: int, settings: PromoteSettings) -> float:
    """Return the one-sided significance level of a comparison with one champion, counted from 1.

    Alpha spending: in each block of N = `settings.nights` comparisons, comparison j has the level error_rate /
    (j (1 + 1/2 + ... + 1/N)). The levels of any N consecutive comparisons sum to `error_rate`. By Boole's
    inequality, this is the maximum probability of promoting a policy in N nights that equals the champion.
    """
    place = (comparison - 1) % settings.nights + 1
    return settings.error_rate / (place * sum(1 / each for each in range(1, settings.nights + 1)))


def prompts_needed(level: float) -> int:
    """Return the minimum number of prompts for significance: if all N are won, the sign-flip test has p 2^-N."""
    return math.ceil(-math.log2(level))


def kept_for_gate(prompts: Sequence[str]) -> NDArray[np.bool_]:
    """Return which held-out prompts only the gate uses if there is no judge: half of them, by a hash."""
    return np.array([hashlib.sha256(prompt.encode()).digest()[0] % 2 == 1 for prompt in prompts], dtype=bool)


def gate_prompts(held_out: pd.DataFrame, used: Set[str], count: int, seed: int) -> tuple[pd.DataFrame, bool]:
    """Return `count` rows of the held-out table for the gate, and whether their prompts are fresh.

    Prompts in `used`, those of the choice, are left out if the others are at least half of all prompts. If there
    are fewer rows than `count`, all rows appear equally often, up to one.
    """
    fresh = held_out[~held_out["prompt"].isin(used)]
    is_fresh = 2 * fresh["prompt"].nunique() >= held_out["prompt"].nunique()
    pool = fresh if is_fresh else held_out
    order = np.random.default_rng(seed).permutation(len(pool))
    return pool.iloc[np.resize(order, count)].reset_index(drop=True), is_fresh
