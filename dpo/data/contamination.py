"""Decontamination: pairs that contain a text of a benchmark on which models are compared.

A benchmark text is contained in a pair if they share a run of `RUN` words, without case and punctuation; of a
shorter text, all words (Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C).
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dpo.data.formats import PAIR_TEXTS, Pair
from dpo.data.readers import READERS, read_files

RUN, SHORTEST = 13, 8
"""Words of a run. Texts of fewer than `SHORTEST` words are not compared: they occur in unrelated texts."""
WORD = re.compile(r"\w+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)

Runs = dict[int, NDArray[np.uint64]]
"""Sorted hashes of runs of words, by their number of words."""


@functools.cache
def benchmark_runs(folder: Path) -> Runs:
    """Return the runs of all texts in the files of a folder. Empty if there are no files.

    Raises:
        InputError: a file is unreadable.
    """
    found: dict[int, list[NDArray[np.uint64]]] = defaultdict(list)
    for text in _texts(folder):
        words = WORD.findall(text.casefold())
        if len(words) >= SHORTEST:
            length = min(RUN, len(words))
            found[length].append(_runs(_hashes(words), length))
    return {length: np.unique(np.concatenate(runs)) for length, runs in found.items()}


def contaminated(pairs: Sequence[Pair], benchmarks: Runs) -> list[str | None]:
    """Return for each pair the start of a benchmark's run that one of its texts contains, or None."""
    words: list[str] = []
    owners: list[int] = []
    for number, pair in enumerate(pairs):
        for field in PAIR_TEXTS:
            found = [*WORD.findall((pair[field] or "").casefold()), f"\0{number}{field}"]  # no run spans two texts
            words += found
            owners += [number] * len(found)
    hashes, matches = _hashes(words), dict[int, str]()
    for length, runs in benchmarks.items():
        for place in np.flatnonzero(np.isin(_runs(hashes, length), runs)).tolist():
            matches.setdefault(owners[place], " ".join(words[place : place + length]))
    return [matches.get(number) for number in range(len(pairs))]


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".txt":
            yield from path.read_text(errors="replace").splitlines()
        elif path.with_suffix("").suffix in READERS or path.suffix in READERS:
            for raw in read_files([str(path)]):
                yield from _strings(raw.row)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)


def _hashes(words: Sequence[str]) -> NDArray[np.uint64]:
    codes, distinct = pd.factorize(np.array(words, dtype=object))
    return pd.util.hash_array(distinct, categorize=False)[codes] if words else np.empty(0, np.uint64)


def _runs(hashes: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """Return a hash of each run of `length` words, in their order."""
    count = max(0, len(hashes) - length + 1)
    runs = np.zeros(count, np.uint64)
    for place in range(length):
        runs = runs * FACTOR + hashes[place : place + count]
    return runs
