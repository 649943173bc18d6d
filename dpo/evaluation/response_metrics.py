"""What a policy's own answers say of it, against the reference's answers to the same prompts."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit

from dpo.evaluation.bootstrap import Numbers, Statistic, bootstrap, mean, over, ratio

RIDGE = 0.01
"""Weight of half the squared coefficients in `length_controlled`: next to nothing, yet all wins stay finite."""

NEWTON_STEPS, CONVERGED = 25, 1e-9
"""The most steps, and the step that is small enough: some six suffice, and 20 where 100,000 answers all win."""

Ids = Sequence[int]


def answer_metrics(table: pd.DataFrame, seed: int) -> dict[str, float | list[float]]:
    """Figures of sampled answers, each with its 95% interval `*_ci`; whole prompts are drawn.

    Tokens are counted with the end token of a finished answer; n-grams of tokens are taken without it.

    - `kl` and `tokens`: means an answer; `kl_per_token`, `entropy_per_token`: sums over all tokens;
      `length_ratio`: tokens over the reference's; `implicit_reward`: its mean.
    - `repetition`: mean over answers of the share of 4-grams that stood before in the same answer (seq-rep-4,
      Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training"), 0 without any;
      `reference_repetition`, and `repetition_rise` above it.
    - `distinct_1`, `distinct_2`: distinct n-grams over all n-grams of the set (Li et al. 2016, "A
      Diversity-Promoting Objective Function"), 0 without any; `reference_distinct_2`, and `distinct_2_ratio` to
      it. In resamples an n-gram keeps the share of one that it has in the set.
    - `empty`: share of answers without a visible character; `unfinished`: share without an end token, and
      `unfinished_rise` above the reference's.
    - With a judge: `win_rate`, mean of `win`; `tie_rate`, share of 0.5; `length_controlled_win_rate`, see
      `length_controlled`; `judged_gain`, the rise of the score, or without scores of the win rate above 0.5;
      `failed_verdicts`, the number of answers whose `win` is NaN, which are left out of the figures before;
      with scores: `reward` and `reference_reward`, their means.

    Args:
        table: one row an answer: `prompt`; `policy`, text; `policy_ids` and `reference_ids`, tokens;
            `policy_finished` and `reference_finished`; `kl` and `entropy`, nats summed over the answer's tokens;
            `implicit_reward`. From a judge `win`, from 0 to 1 or NaN for a failed verdict, and from a scorer
            `policy_score` and `reference_score`.
        seed: of the bootstrap.

    Returns:
        The figures and `samples`, the number of answers. A ratio to nothing is left out.
    """
    counts: dict[str, float | list[float]] = {"samples": len(table)}
    tokens, reference_tokens = table["policy_ids"].map(len), table["reference_ids"].map(len)
    answers, reference_answers = _content(table, "policy"), _content(table, "reference")
    repetition, reference_repetition = (
        np.array([_repetition(answer) for answer in side]) for side in (answers, reference_answers)
    )
    distinct, reference_distinct = _distinct(answers, 2), _distinct(reference_answers, 2)
    unfinished, reference_unfinished = 1.0 - table["policy_finished"], 1.0 - table["reference_finished"]
    statistics = {
        "kl": mean(table["kl"]),
        "kl_per_token": ratio(table["kl"], tokens),
        "entropy_per_token": ratio(table["entropy"], tokens),
        "tokens": mean(tokens),
        "length_ratio": ratio(tokens, reference_tokens),
        "repetition": mean(repetition),
        "reference_repetition": mean(reference_repetition),
        "repetition_rise": mean(repetition - reference_repetition),
        "distinct_1": _distinct(answers, 1),
        "distinct_2": distinct,
        "reference_distinct_2": reference_distinct,
        "distinct_2_ratio": over(distinct, reference_distinct),
        "empty": mean([not _visible(text) for text in table["policy"]]),
        "unfinished": mean(unfinished),
        "unfinished_rise": mean(unfinished - reference_unfinished),
        "implicit_reward": mean(table["implicit_reward"]),
    }
    if "win" in table:
        judged, win = table["win"].notna(), table["win"].fillna(0.5)
        counts["failed_verdicts"] = int((~judged).sum())
        statistics |= {
            "win_rate": ratio(win * judged, judged),
            "tie_rate": ratio(judged & (win == 0.5), judged),
            "length_controlled_win_rate": length_controlled(win, tokens - reference_tokens, judged),
            "judged_gain": ratio((win - 0.5) * judged, judged),
        }
    if "policy_score" in table:
        statistics |= {
            "reward": mean(table["policy_score"]),
            "reference_reward": mean(table["reference_score"]),
            "judged_gain": mean(table["policy_score"] - table["reference_score"]),
        }
    return counts | bootstrap(statistics, table["prompt"].tolist(), seed)


def length_controlled(wins: ArrayLike, longer: ArrayLike, judged: ArrayLike = 1.0) -> Statistic:
    """The win rate that answers of the reference's length would have.

    After Dubois et al. 2024, "Length-Controlled AlpacaEval", with no terms but length: sigmoid(a) of the logistic
    regression of wins on a + b tanh(longer / its standard deviation), by Newton's method in each resample.

    Args:
        wins: N outcomes from 0 to 1.
        longer: tokens that each answer has more than the reference's.
        judged: 1 for outcomes that count, 0 for others.
    """
    won, more = np.asarray(wins, float), np.asarray(longer, float)
    x = np.tanh(more / (more.std() or 1))

    def statistic(weights: Numbers) -> Numbers:
        weights = weights * np.asarray(judged, float)
        a = b = np.zeros(len(weights))
        for _ in range(NEWTON_STEPS):
            p = expit(a[:, None] + b[:, None] * x)
            error, curvature = weights * (won - p), weights * p * (1 - p)
            slope_a, slope_b = error.sum(1) - RIDGE * a, error @ x - RIDGE * b
            aa, ab, bb = curvature.sum(1) + RIDGE, curvature @ x, curvature @ x**2 + RIDGE
            determinant = aa * bb - ab**2
            step_a = (bb * slope_a - ab * slope_b) / determinant
            step_b = (aa * slope_b - ab * slope_a) / determinant
            a, b = a + step_a, b + step_b
            if max(np.abs(step_a).max(), np.abs(step_b).max()) < CONVERGED:
                break
        return expit(a)

    return statistic


def _content(table: pd.DataFrame, side: str) -> list[Ids]:
    answers = zip(table[f"{side}_ids"], table[f"{side}_finished"], strict=True)
    return [ids[:-1] if finished else ids for ids, finished in answers]


def _grams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def _repetition(ids: Ids) -> float:
    grams = _grams(ids, 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _distinct(answers: Sequence[Ids], n: int) -> Statistic:
    """Each n-gram counts as one over its occurrences in the whole set, so that all of them sum to the distinct."""
    grams = [_grams(ids, n) for ids in answers]
    occurrences = Counter(gram for each in grams for gram in each)
    share = ratio([sum(1 / occurrences[gram] for gram in each) for each in grams], [len(each) for each in grams])
    return lambda weights: np.nan_to_num(share(weights))


def _visible(text: str) -> bool:
    return any(character.isprintable() and character != " " for character in text)
