"""Rows against rows: repeats, almost-repeats, contradictions and leaks between the splits.

Texts are compared by hashes of their normal forms, so a million pairs take some 600 bytes each. Near duplicates
are found by MinHash over pairs of neighbouring words (Broder 1997; `rensa`) with banding: candidates share all
values of a band, and count if the share of equal values is large enough for the completions and for the prompt.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rensa import RMinHash

from dpo.data.formats import Pair, normal
from dpo.data.rules import TEXTS, Finding

PERMUTATIONS, BAND = 64, 8
"""MinHash values of a text, and how many of them make a band: a pair of similarity 0.9 is found with 99%."""
SEED = 1


@dataclass(frozen=True)
class Marks:
    """What is kept of R rows to compare them."""

    row: NDArray[np.int64]
    """Positions in the candidate table [R]."""
    texts: NDArray[np.uint64]
    """Hashes of the normal forms of prompt, chosen and rejected [R, 3]."""
    id: NDArray[np.uint64]
    """Hashes of the ids [R]."""
    held_out: NDArray[np.bool_]
    """Whether the row is in the eval split [R]."""
    sketch: NDArray[np.uint32]
    """MinHash values of the prompt and of both completions together [R, 2, PERMUTATIONS]."""

    def __len__(self) -> int:
        return len(self.row)

    def where(self, kept: NDArray[np.bool_]) -> "Marks":
        """The rows of a mask."""
        return Marks(*(getattr(self, field.name)[kept] for field in fields(self)))


def mark(pairs: Sequence[Pair], rows: Sequence[int]) -> Marks:
    """The marks of pairs at these positions of the candidate table."""
    normals = [[normal(pair[field]) for field in TEXTS] for pair in pairs]
    completions = [f"{chosen}\x1f{rejected}" for _, chosen, rejected in normals]
    return Marks(
        np.array(rows, np.int64),
        _hash([text for texts in normals for text in texts]).reshape(-1, 3),
        _hash([pair["id"] for pair in pairs]),
        np.array([pair["split"] == "eval" for pair in pairs], bool),
        np.stack([_sketch([prompt for prompt, *_ in normals]), _sketch(completions)], 1),
    )


def join(parts: Sequence[Marks]) -> Marks:
    """Several marks as one."""
    return Marks(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Marks)))


def _hash(texts: Sequence[str]) -> NDArray[np.uint64]:
    return pd.util.hash_array(np.array(texts, dtype=object), categorize=False) if texts else np.empty(0, np.uint64)


def _sketch(texts: Sequence[str]) -> NDArray[np.uint32]:
    words = [text.split() or [""] for text in texts]
    ends = np.cumsum([len(w) for w in words], dtype=np.int64)
    codes, distinct = pd.factorize(np.array([word for w in words for word in w], dtype=object))
    hashes = _hash(list(distinct))[codes]
    shingles = hashes * np.uint64(0x9E3779B97F4A7C15)
    shingles[:-1] += hashes[1:]  # each word with the next
    shingles[ends - 1] = hashes[ends - 1]  # the last one alone
    rows = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, np.append(0, ends), PERMUTATIONS, SEED
    ).to_rows()
    return np.array(rows, np.uint32).reshape(-1, PERMUTATIONS)


def compare(marks: Marks, similarity: float, barring: frozenset[str]) -> Iterator[Finding]:
    """Breaches of the rules that hold between rows; of repeats the first one is none.

    Args:
        marks: of all rows that keep the rules of single rows, in table order.
        similarity: least estimated Jaccard similarity of near duplicates.
        barring: rules whose breach sets a row aside; such a row is not compared any further.
    """
    for check in (_same_id, _same_pair, _contradictions, functools.partial(_near, similarity=similarity), _leaks):
        found = list(check(marks))
        yield from found
        marks = marks.where(~np.isin(marks.row, [finding.row for finding in found if finding.rule in barring]))


def _same_id(marks: Marks) -> Iterator[Finding]:
    yield from _repeats(marks, marks.id, "duplicate_id", "the same id as row {}")


def _same_pair(marks: Marks) -> Iterator[Finding]:
    yield from _repeats(marks, _combine(marks.texts), "duplicate_pair", "the same pair as row {}")


def _combine(columns: NDArray[np.uint64]) -> NDArray[np.uint64]:
    key = columns[:, 0].copy()
    for column in columns.T[1:]:
        key = key * np.uint64(0x9E3779B97F4A7C15) + column
    return key


def _repeats(marks: Marks, key: NDArray[np.uint64], rule: str, reason: str) -> Iterator[Finding]:
    codes, _ = pd.factorize(key)
    first = np.full(codes.max(initial=-1) + 1, -1)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    for i in np.flatnonzero(first[codes] != np.arange(len(codes))):
        yield Finding(int(marks.row[i]), rule, reason.format(marks.row[first[codes[i]]] + 1))


def _near(marks: Marks, similarity: float) -> Iterator[Finding]:
    marks = marks.where(~pd.Series(_combine(marks.texts)).duplicated().to_numpy())
    twin = np.full(len(marks), len(marks))
    for start in range(0, PERMUTATIONS, BAND):
        band = _combine(marks.sketch[:, 1, start : start + BAND].astype(np.uint64))
        # The first row of a band may have another prompt; the first one with the same prompt is looked at too.
        for key in (band, _combine(np.stack([band, marks.texts[:, 0]], 1))):
            order = np.argsort(key, kind="stable")  # rows of a key in table order: the first stands first
            new = np.append(True, key[order][1:] != key[order][:-1])[: len(order)]
            leader = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
            later, leader = order[~new], leader[~new]
            equal = (marks.sketch[later] == marks.sketch[leader]).mean(2).min(1) >= similarity
            np.minimum.at(twin, later[equal], leader[equal])
    for i in np.flatnonzero(twin < len(marks)):
        yield Finding(
            int(marks.row[i]), "near_duplicate_pair", f"almost the same pair as row {marks.row[twin[i]] + 1}"
        )


def _contradictions(marks: Marks) -> Iterator[Finding]:
    prompt, chosen, rejected = marks.texts.T
    ordered = _combine(np.stack([prompt, np.minimum(chosen, rejected), np.maximum(chosen, rejected)], 1))
    table = pd.DataFrame({"key": ordered, "flipped": chosen > rejected, "row": marks.row})
    table = table[table.groupby("key")["flipped"].transform("nunique") > 1]
    other = {
        (key, flipped): row for key, flipped, row in table[["key", "flipped", "row"]][::-1].itertuples(index=False)
    }
    for key, flipped, row in table.itertuples(index=False):
        against = other[key, not flipped] + 1
        yield Finding(
            int(row), "contradiction", f"row {against} prefers the other one of the same two completions"
        )


def _leaks(marks: Marks) -> Iterator[Finding]:
    trained, held_out = marks.where(~marks.held_out), marks.where(marks.held_out)
    for i in np.flatnonzero(np.isin(trained.texts[:, 0], held_out.texts[:, 0])):
        yield Finding(int(trained.row[i]), "prompt_in_both_splits", "its prompt is held out for evaluation")
    seen = np.isin(trained.texts[:, 1:], held_out.texts[:, 1:]).any(1)
    for i in np.flatnonzero(seen):
        yield Finding(
            int(trained.row[i]), "eval_text_in_train", "one of its completions is held out for evaluation"
        )
