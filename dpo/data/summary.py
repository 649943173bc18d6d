"""Summary of the accepted pairs: lengths, length bias, balance of sources and drift."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dpo.data.drift import drift, profile
from dpo.data.formats import PAIR_TEXTS
from dpo.data.settings import ValidateSettings

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
MIN_SOURCE_PAIRS = 20
"""Minimum number of pairs of a source whose balance is checked."""
MAX_SOURCES = 50
"""Number of sources in the report, the largest first."""
BINS = 24
MAX_LABEL_RATIO = 4
"""Maximum number of rows with one label per row with the other."""


@dataclass(frozen=True)
class Summary:
    """Statistics of the accepted pairs. Everything is empty if there are none."""

    metrics: dict[str, Any] = field(default_factory=dict)
    """`lengths`, `chosen_longer`, `sources` and, with an earlier version, `drift`."""
    histograms: dict[str, tuple[list[float], list[int]]] = field(default_factory=dict)
    """Edges and counts of the lengths of prompts, chosen and rejected, up to their 99th percentile."""
    profile: dict[str, Any] = field(default_factory=dict)
    """Statistics with which a later version of the data is compared."""
    notices: list[tuple[str, str]] = field(default_factory=list)
    """Violations of the rules about all rows together, each as rule and reason."""


def summarize(
    lengths: NDArray[np.int32],
    held_out: NDArray[np.bool_],
    sources: Sequence[str],
    prompts: Sequence[str],
    unit: str,
    params: ValidateSettings,
    previous: Mapping[str, Any] | None,
) -> Summary:
    """Summarize R accepted pairs and check the rules of `DATA_RULES`.

    `lengths` [R, 3] are the lengths of prompt, chosen and rejected in `unit`, `held_out` [R] marks the eval split,
    `sources` has R items, `prompts` is a sample. `previous` is the `profile` of an earlier version. It is ignored
    if its unit differs.
    """
    if not len(lengths):
        return Summary()
    labelled = bool((lengths[:, 1:].min(1) == 0).all())
    chosen_longer, bias = _length_bias(lengths, params.max_longer_share)
    by_source, imbalance = _balance(held_out, lengths, sources, params.max_longer_share)
    metrics: dict[str, Any] = {
        "lengths": _quantiles(lengths),
        "chosen_longer": chosen_longer,
        "sources": by_source,
    }
    notices = [("length_bias", reason) for reason in bias] + [("source_imbalance", r) for r in imbalance]
    if labelled:
        counted, reasons = _label_balance(lengths)
        metrics |= {"labels": counted}
        notices += [("label_balance", reason) for reason in reasons]
    counts = {name: source["pairs"] for name, source in by_source.items()}
    if previous and previous.get("unit") == unit:
        metrics["drift"] = by_view = drift(previous, lengths, counts, prompts)
        for name, value in by_view.items():
            if value > params.max_drift:
                reason = f"{name}: population stability index {value:.2f}, the maximum is {params.max_drift:g}"
                notices.append(("drift", reason))
    return Summary(metrics, _histograms(lengths), {"unit": unit, **profile(lengths, counts, prompts)}, notices)


def _quantiles(lengths: NDArray[np.int32]) -> dict[str, dict[str, float]]:
    columns = dict(zip(PAIR_TEXTS, lengths.T, strict=True)) | {"pair": lengths[:, 0] + lengths[:, 1:].max(1)}
    present = {name: values[values > 0] if values.any() else values for name, values in columns.items()}
    return {
        name: {label: float(np.quantile(values, q, method="lower")) for label, q in QUANTILES.items()}
        for name, values in present.items()
    }


def _histograms(lengths: NDArray[np.int32]) -> dict[str, tuple[list[float], list[int]]]:
    top = max(1.0, float(np.quantile(lengths, 0.99)))
    columns = zip(PAIR_TEXTS, np.minimum(lengths, top).T, strict=True)
    counted = {name: np.histogram(values, BINS, (0, top)) for name, values in columns}
    return {name: (edges.tolist(), counts.tolist()) for name, (counts, edges) in counted.items()}


def _length_bias(lengths: NDArray[np.int32], maximum: float) -> tuple[dict[str, float] | None, list[str]]:
    """Return the share of pairs of unequal length in which chosen is longer, and the reasons why it is a bias."""
    lengths = lengths[lengths[:, 1:].min(1) > 0]  # a labelled row has one completion
    longer, unequal = int((lengths[:, 1] > lengths[:, 2]).sum()), int((lengths[:, 1] != lengths[:, 2]).sum())
    if not unequal:
        return None, []
    low, high = wilson_interval(longer, unequal)
    share = {"share": longer / unequal, "low": low, "high": high}
    if 1 - maximum <= share["high"] and share["low"] <= maximum:
        return share, []
    part, side = max((share["share"], "chosen"), (1 - share["share"], "rejected"))
    bounds = f"{share['low']:.3f} to {share['high']:.3f}"
    return share, [f"{side} is the longer one in {part:.0%} of pairs (95% interval for chosen: {bounds})"]


def _label_balance(lengths: NDArray[np.int32]) -> tuple[dict[str, int], list[str]]:
    """Return the number of labelled rows by label, and the reason why they are out of balance.

    The weights are those of Ethayarajh et al. 2024, eq. 8.
    """
    counts = {"desirable": int((lengths[:, 1] > 0).sum()), "undesirable": int((lengths[:, 2] > 0).sum())}
    (rare, few), (_, many) = sorted(counts.items(), key=lambda item: item[1])
    if many <= MAX_LABEL_RATIO * few:
        return counts, []
    if not few:
        return counts, [f"no row is {rare}, so nothing is compared; add rows with this label"]
    low, high = (3 / 4, 1) if rare == "undesirable" else (1, 4 / 3)
    weights = f"losses.kto.{rare}_weight from {low * many / few:.3g} to {high * many / few:.3g}"
    return counts, [f"{few} rows are {rare} and {many} are not; set {weights}"]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% score interval of a share (Wilson 1927, "Probable Inference, the Law of Succession")."""
    share, z = successes / trials, 1.959963984540054
    centre, spread = (
        share + z**2 / (2 * trials),
        z * math.sqrt((share * (1 - share) + z**2 / (4 * trials)) / trials),
    )
    low, high = ((centre + sign * spread) / (1 + z**2 / trials) for sign in (-1, 1))
    return 0.0 if successes == 0 else low, 1.0 if successes == trials else high


def _balance(
    held_out: NDArray[np.bool_], lengths: NDArray[np.int32], sources: Sequence[str], maximum: float
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return pairs, held-out pairs and length bias of the largest sources, and the imbalances."""
    table = pd.Series(sources)
    names = table.value_counts()
    by_source, imbalances = {}, []
    for name in names.index[:MAX_SOURCES]:
        mask = (table == name).to_numpy()
        pairs, evals = int(mask.sum()), int(held_out[mask].sum())
        share, bias = _length_bias(lengths[mask], maximum)
        by_source[str(name)] = {"pairs": pairs, "eval": evals, "chosen_longer": share and share["share"]}
        if len(names) > 1 and pairs >= MIN_SOURCE_PAIRS:
            imbalances += [f"source {name!r}: {reason}" for reason in bias]
            if evals in (0, pairs):
                imbalances.append(f"source {name!r}: all of its {pairs} pairs are in one split")
    return by_source, imbalances
