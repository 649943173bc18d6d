"""Metrics of a policy's sampled responses, against the reference's responses to the same prompts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit

from dpo.evaluation.bootstrap import Numbers, Statistic, bootstrap, mean, over, ratio
from dpo.evaluation.verifier_metrics import verifier_statistics

RIDGE = 0.01  # weight of half the squared coefficients; it keeps the fit finite if all responses win
MAX_NEWTON_STEPS, TOLERANCE = 25, 1e-9  # about 6 steps are usual, and 20 if all of 100,000 responses win
Ids = Sequence[int]


def response_metrics(table: pd.DataFrame, seed: int) -> dict[str, float | list[float]]:
    """Return the metrics of sampled responses, each with its 95% interval `*_ci`, resampled by prompt.

    Token counts include the end token of a finished response; n-grams of tokens leave it out.

    - `kl` and `tokens`: means per response. `kl_per_token`, `entropy_per_token`: sums divided by all tokens.
      `length_ratio`: tokens divided by the reference's. `implicit_reward`: mean. KL, entropy and implicit reward
      are over the `kl_samples` responses on which they are not NaN.
    - `repetition`: mean over responses of the share of 4-grams that occur earlier in the same response
      (seq-rep-4, Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training"), 0 without 4-grams;
      `reference_repetition`; `repetition_rise`, the difference.
    - `distinct_1`, `distinct_2`: distinct n-grams divided by all n-grams of all responses (Li et al. 2016, "A
      Diversity-Promoting Objective Function"), 0 without n-grams; `reference_distinct_2`; `distinct_2_ratio`,
      the quotient. In resamples each n-gram keeps the weight 1 / occurrences of the full set.
    - `empty`: share of responses without a visible character. `unfinished`: share without an end token;
      `reference_unfinished`; `unfinished_rise`, the difference. `unchanged`: share of responses that equal the
      reference's.
    - With a judge: `win_rate`, mean of `win`; `tie_rate`, share of 0.5; `length_controlled_win_rate`, see
      `length_controlled`; `judged_gain`, the mean difference of the scores, or without scores the win rate minus
      0.5; with scores `reward` and `reference_reward`, their means. `failed_verdicts` counts the responses whose
      `win` is NaN, which are left out. Each further judge adds `win_rate/NAME`, `failed_verdicts/NAME` and
      `same_verdict/NAME`, the share of responses on which it and the first judge prefer the same side.
      `base_win_rate`, and with further judges `base_win_rate/NAME`: mean of `base_win`, against the base model.
    - With a verifier: see `dpo.evaluation.verifier_metrics.verifier_statistics`.

    - `samples`, the number of responses. A ratio with denominator 0 is left out.

    The table has one row per response: `prompt`; `response`, text; `ids` and `reference_ids`, tokens; `finished`
    and `reference_finished`; `kl` and `entropy`, nats summed over the response's tokens; `implicit_reward`. From
    the first judge it has `win`, from 0 to 1 or NaN for a failed verdict, and if that judge scores `score` and
    `reference_score`; from a further judge `win/NAME`.
    """
    tokens, reference_tokens = table["ids"].map(len), table["reference_ids"].map(len)
    scored = table["kl"].notna()
    scored_tokens = tokens.where(scored, 0)
    responses, reference_responses = _without_end(table, ""), _without_end(table, "reference_")
    repetition, reference_repetition = (
        np.array([_repetition(ids) for ids in side]) for side in (responses, reference_responses)
    )
    distinct, reference_distinct = _distinct(responses, 2), _distinct(reference_responses, 2)
    unfinished, reference_unfinished = 1.0 - table["finished"], 1.0 - table["reference_finished"]
    both = zip(table["ids"], table["reference_ids"], strict=True)
    statistics = {
        "kl": mean(table["kl"]),
        "kl_per_token": ratio(table["kl"].fillna(0), scored_tokens),
        "entropy_per_token": ratio(table["entropy"].fillna(0), scored_tokens),
        "tokens": mean(tokens),
        "length_ratio": ratio(tokens, reference_tokens),
        "repetition": mean(repetition),
        "reference_repetition": mean(reference_repetition),
        "repetition_rise": mean(repetition - reference_repetition),
        "distinct_1": _distinct(responses, 1),
        "distinct_2": distinct,
        "reference_distinct_2": reference_distinct,
        "distinct_2_ratio": over(distinct, reference_distinct),
        "empty": mean([not _has_visible_character(text) for text in table["response"]]),
        "unfinished": mean(unfinished),
        "reference_unfinished": mean(reference_unfinished),
        "unfinished_rise": mean(unfinished - reference_unfinished),
        "unchanged": mean([list(ids) == list(others) for ids, others in both]),
        "implicit_reward": mean(table["implicit_reward"]),
    }
    counts: dict[str, float | list[float]] = {"samples": len(table), "kl_samples": int(scored.sum())}
    for column, wins in table.filter(regex="^win(/|$)").items():
        judge = str(column).removeprefix("win")
        counts[f"failed_verdicts{judge}"] = int(wins.isna().sum())
        statistics[f"win_rate{judge}"] = ratio(wins.fillna(0), wins.notna())
        if judge:
            judged = wins.notna() & table["win"].notna()
            same = np.sign(wins - 0.5) == np.sign(table["win"] - 0.5)
            statistics[f"same_verdict{judge}"] = ratio(judged & same, judged)
    for column in map(str, table.filter(regex="^right_work(/|$)")):
        statistics |= verifier_statistics(table, column.removeprefix("right_work"))
    for column, wins in table.filter(regex="^base_win(/|$)").items():
        judge = str(column).removeprefix("base_win")
        statistics[f"base_win_rate{judge}"] = ratio(wins.fillna(0), wins.notna())
    if "win" in table:
        statistics |= _judge_statistics(table, tokens - reference_tokens)
    return counts | bootstrap(statistics, table["prompt"].tolist(), seed)


def _judge_statistics(table: pd.DataFrame, extra_tokens: pd.Series) -> dict[str, Statistic]:
    judged, win = table["win"].notna(), table["win"].fillna(0.5)
    statistics = {
        "tie_rate": ratio(table["win"] == 0.5, judged),
        "length_controlled_win_rate": length_controlled(win, extra_tokens, judged),
    }
    if "score" not in table:
        return statistics | {"judged_gain": ratio(win - 0.5, judged)}
    return statistics | {
        "reward": mean(table["score"]),
        "reference_reward": mean(table["reference_score"]),
        "judged_gain": mean(table["score"] - table["reference_score"]),
    }


def length_controlled(wins: ArrayLike, extra_tokens: ArrayLike, judged: ArrayLike = 1.0) -> Statistic:
    """Return the win rate that responses of the reference's length would have.

    After Dubois et al. 2024, "Length-Controlled AlpacaEval", with length as the only term: sigmoid(a) of the
    logistic regression of wins on a + b tanh(extra / std(extra)), fitted by Newton's method in each resample.

    The N wins are from 0 to 1. `extra_tokens` are the tokens of each response minus those of the reference's
    response. `judged` is 1 for outcomes that count, 0 for others.
    """
    won, extra = np.asarray(wins, float), np.asarray(extra_tokens, float)
    x = np.tanh(extra / (extra.std() or 1))

    def statistic(weights: Numbers) -> Numbers:
        weights = weights * np.asarray(judged, float)
        a = b = np.zeros(len(weights))
        for _ in range(MAX_NEWTON_STEPS):
            p = expit(a[:, None] + b[:, None] * x)
            error, curvature = weights * (won - p), weights * p * (1 - p)
            slope_a, slope_b = error.sum(1) - RIDGE * a, error @ x - RIDGE * b
            aa, ab, bb = curvature.sum(1) + RIDGE, curvature @ x, curvature @ x**2 + RIDGE
            determinant = aa * bb - ab**2
            step_a = (bb * slope_a - ab * slope_b) / determinant
            step_b = (aa * slope_b - ab * slope_a) / determinant
            a, b = a + step_a, b + step_b
            if max(np.abs(step_a).max(), np.abs(step_b).max()) < TOLERANCE:
                break
        return expit(a)

    return statistic


def win_slices(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the win rate of judged responses by source of the prompt and by length against the reference's.

    The table is that of `response_metrics` with the column `source`.

    Returns:
        One row per slice: `slice`, `source` or `length`; `value`; `responses`, their number; `win_rate` with the
        limits `low` and `high` of its 95% interval. A slice in which no response has a verdict is left out.
    """
    extra = np.sign(table["ids"].map(len) - table["reference_ids"].map(len))
    lengths = {
        -1: "shorter than the reference's",
        0: "as long as the reference's",
        1: "longer than the reference's",
    }
    parts = [("source", str(value), part) for value, part in table.groupby("source")]
    parts += [("length", words, table[extra == sign]) for sign, words in lengths.items()]
    rows: list[dict[str, Any]] = []
    for name, value, part in parts:
        part = part[part["win"].notna()]
        if len(part):
            found: Any = bootstrap({"win_rate": mean(part["win"])}, part["prompt"].tolist(), seed)
            low, high = found.pop("win_rate_ci")
            rows.append({"slice": name, "value": value, "responses": len(part), **found, "low": low, "high": high})
    return pd.DataFrame(rows)


def _without_end(table: pd.DataFrame, prefix: str) -> list[Ids]:
    rows = zip(table[f"{prefix}ids"], table[f"{prefix}finished"], strict=True)
    return [ids[:-1] if finished else ids for ids, finished in rows]


def _grams(ids: Ids, n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def _repetition(ids: Ids) -> float:
    grams = _grams(ids, 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _distinct(responses: Sequence[Ids], n: int) -> Statistic:
    """Weight each n-gram with 1 / occurrences in all responses, so that their sum counts the distinct ones."""
    grams = [_grams(ids, n) for ids in responses]
    occurrences = Counter(gram for each in grams for gram in each)
    share = ratio([sum(1 / occurrences[gram] for gram in each) for each in grams], [len(each) for each in grams])
    return lambda weights: np.nan_to_num(share(weights))


def _has_visible_character(text: str) -> bool:
    return any(character.isprintable() and character != " " for character in text)
