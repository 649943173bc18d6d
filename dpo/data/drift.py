"""Drift of preference data from an earlier version, measured by the population stability index (PSI).

PSI = sum over bins of (new - old) ln(new / old), where new and old are shares. By convention a PSI below 0.1 means
no change and above 0.25 a clear one. It is computed for lengths in tokens (bins: deciles of the old data, and
shorter than all old data), sources, and clusters of prompts (k-means on hashed words; an additional bin counts
prompts that are far from all clusters).
"""

import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from dpo.data.formats import PAIR_TEXTS

DECILES = np.linspace(0.1, 0.9, 9)
CLUSTERS, DIMENSIONS = 8, 128
NEAR = 0.95
"""Share of the old prompts within the radius of the clusters."""
FLOOR = 1e-3
"""Minimum share of a bin. An empty bin would make the index infinite."""


def profile(lengths: NDArray[np.int32], sources: Mapping[str, int], prompts: Sequence[str]) -> dict[str, Any]:
    """Return statistics of the data with which a later version can be compared.

    `lengths` are the numbers of tokens of prompt, chosen and rejected [R, 3], R at least 1. `sources` is the
    number of pairs per source. `prompts` is a sample of the prompts, at least one.
    """
    by_text = {}
    for name, values in zip(PAIR_TEXTS, lengths.T, strict=True):
        edges = sorted({float(values.min()) - 1, *np.quantile(values, DECILES).tolist()})
        by_text[name] = {"edges": edges, "shares": _length_shares(values, edges)}
    vectors = _vectors(prompts)
    distinct = np.unique(vectors, axis=0)
    if len(distinct) > CLUSTERS:
        distinct, _ = kmeans2(distinct, CLUSTERS, minit="++", rng=0)
    centres = np.round(distinct, 4)
    radius = float(np.quantile(_distances(vectors, centres).min(1), NEAR))
    shares = _cluster_shares(vectors, centres, radius)
    return {
        "lengths": by_text,
        "sources": _normalised(sources),
        "prompts": {"centres": centres.tolist(), "radius": radius, "shares": shares},
    }


def drift(
    old: Mapping[str, Any], lengths: NDArray[np.int32], sources: Mapping[str, int], prompts: Sequence[str]
) -> dict[str, float]:
    """Return the PSI of lengths, sources and prompts against an old `profile`. Arguments as in `profile`."""
    views = {}
    for name, values in zip(PAIR_TEXTS, lengths.T, strict=True):
        known = old["lengths"][name]
        views[f"{name}_tokens"] = psi(known["shares"], _length_shares(values, known["edges"]))
    new, names = _normalised(sources), sorted({*old["sources"], *sources})
    views["sources"] = psi([old["sources"].get(n, 0) for n in names], [new.get(n, 0) for n in names])
    clusters = old["prompts"]
    shares = _cluster_shares(_vectors(prompts), np.array(clusters["centres"]), clusters["radius"])
    views["prompts"] = psi(clusters["shares"], shares)
    return views


def psi(old: Sequence[float], new: Sequence[float]) -> float:
    """Return the population stability index of two distributions over the same bins. It is at least 0."""
    pairs = [(max(o, FLOOR), max(n, FLOOR)) for o, n in zip(old, new, strict=True)]
    return sum((n - o) * math.log(n / o) for o, n in pairs)


def _shares(bins: NDArray[np.int64], count: int) -> list[float]:
    counts = np.bincount(bins, minlength=count)
    return (counts / counts.sum()).tolist()


def _length_shares(values: NDArray[np.int32], edges: Sequence[float]) -> list[float]:
    return _shares(np.searchsorted(edges, values), len(edges) + 1)


def _normalised(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items())}


def _vectors(prompts: Sequence[str]) -> NDArray[np.float64]:
    """Return hashed bags of words of unit length [N, DIMENSIONS]."""
    vectors = np.zeros((len(prompts), DIMENSIONS))
    for row, prompt in enumerate(prompts):
        for word, count in Counter(prompt.casefold().split()).items():
            code = zlib.crc32(word.encode())
            vectors[row, code % DIMENSIONS] += count if code >> 31 else -count
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def _distances(vectors: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return squared distances [N, clusters]."""
    return (vectors**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * vectors @ centres.T


def _cluster_shares(vectors: NDArray[np.float64], centres: NDArray[np.float64], radius: float) -> list[float]:
    """Return the share of each cluster, and last the share of prompts outside the radius of all clusters."""
    distances = _distances(vectors, centres)
    nearest = np.where(distances.min(1) > radius + 1e-6, len(centres), distances.argmin(1))
    return _shares(nearest, len(centres) + 1)
