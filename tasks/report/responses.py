"""Responses on the report's page: the worst losses and the biggest wins first."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

EXTREMES = 3  # losses, and wins, of the selected policy that the page shows in full
MAX_RESPONSES = 100  # of each policy in the table

Conversation = list[Mapping[str, Any]]


def gains(samples: pd.DataFrame) -> pd.Series:
    """Return how much better the judge finds each response than the reference's.

    The unit is the score's, or that of `win` minus 0.5 if the judge only compares. The gain is NaN without a judge
    and for a failed verdict.
    """
    if "score" in samples:
        return samples["score"] - samples["reference_score"]
    return samples["win"] - 0.5 if "win" in samples else pd.Series(float("nan"), samples.index)


def extremes(
    samples: dict[str, pd.DataFrame], conversations: list[Conversation], policy: str | None
) -> dict[str, Any]:
    """Return the policy and its worst losses and biggest wins; those of the first policy if none is named."""
    name = policy or next(iter(samples))
    gain = gains(samples[name]).sort_values(kind="stable")
    losses, wins = gain[gain < 0].index[:EXTREMES], gain[gain > 0].index[::-1][:EXTREMES]
    rows = _rows(name, samples[name], conversations)
    return {"policy": name, "losses": [rows[i] for i in losses], "wins": [rows[i] for i in wins]}


def shown_responses(samples: dict[str, pd.DataFrame], conversations: list[Conversation]) -> list[dict[str, Any]]:
    """Return up to `MAX_RESPONSES` rows of each policy, the worst losses first, then the biggest wins.

    Rows in the middle are left out. Without a judge the rows keep their order.
    """
    shown = []
    for name, table in samples.items():
        gain = gains(table).sort_values(kind="stable")
        losses, others = gain[gain < 0].index, gain[~(gain < 0)].sort_values(ascending=False, kind="stable").index
        first = losses[: max(MAX_RESPONSES // 2, MAX_RESPONSES - len(others))]
        rows = _rows(name, table, conversations)
        shown += [rows[i] for i in [*first, *others[: MAX_RESPONSES - len(first)]]]
    return shown


def _rows(name: str, table: pd.DataFrame, conversations: list[Conversation]) -> list[dict[str, Any]]:
    table = table.assign(policy=name, gain=gains(table), turns=pd.Series(conversations))
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
