"""Comparison of rows with each other: duplicates, near duplicates, contradictions and leaks between the splits.

Texts are compared by hashes of their normalized forms, so a pair takes about 470 bytes of memory. Near duplicates
are found by MinHash over pairs of neighbouring words (Broder 1997; `rensa`) with banding: two rows that share all
values of a band are near duplicates if the share of equal values is large enough for the prompt and for each
completion.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rensa import RMinHash

from dpo.data.checks import Violation
from dpo.data.formats import COMPLETIONS, PAIR_TEXTS, Pair, normalize
from dpo.data.phrases import SAMPLED_ROWS, SHORT_TEXT, fitting_any_prompt

Read = Callable[[set[int]], Mapping[int, Sequence[str]]]
"""Returns prompt, chosen and rejected of rows of the raw table, by their positions."""

PERMUTATIONS, BAND = 64, 8
"""MinHash values per text, and per band. A near duplicate of similarity 0.9 is found with a probability of 99%."""
SEED = 1
COMPARED_AT_ONCE = 100_000
"""Rows whose sketches are compared at once. In large data most rows share a band, and a comparison takes 1 kB."""
SHORT, PROMPTS_OF_SHORT, PROMPTS, WORDS_PER_PROMPT = 3, 3, 5, 5
"""A completion is a stock phrase if it answers enough different prompts: `PROMPTS_OF_SHORT` if it has at most
`SHORT` words, else `PROMPTS`, and one per `WORDS_PER_PROMPT` words."""
LONG_WORD, CHARACTERS_PER_WORD = 20, 2
"""A text whose words are longer on average has no spaces, such as Chinese; it has a word per two characters."""


Sketches = NDArray[np.uint16]


@dataclass(frozen=True)
class Fingerprints:
    """Hashes of R rows, enough to compare them."""

    row: NDArray[np.int64]
    """Positions in the raw table [R]."""
    texts: NDArray[np.uint64]
    """Hashes of the normalized prompt, chosen and rejected [R, 3]."""
    id: NDArray[np.uint64]
    """Hashes of the ids [R]."""
    held_out: NDArray[np.bool_]
    """Whether the row is in the eval split [R]."""
    words: NDArray[np.int32]
    """Number of words of the same texts [R, 3]."""
    context: NDArray[np.uint64]
    """Hashes of what else the model reads [R]: tools and variables of the template."""
    calls: NDArray[np.bool_]
    """Whether chosen and rejected are only tool calls [R, 2]."""

    def __len__(self) -> int:
        return len(self.row)

    @property
    def read(self) -> NDArray[np.uint64]:
        """Hashes of all that the model reads [R, 4]."""
        return np.column_stack([self.texts, self.context])

    def select(self, mask: NDArray[np.bool_]) -> "Fingerprints":
        """Return the rows of a mask."""
        return Fingerprints(*(column[mask] for column in vars(self).values()))


def fingerprint(pairs: Sequence[Pair], rows: Sequence[int]) -> tuple[Fingerprints, Sketches]:
    """Return the fingerprints of pairs at these positions of the raw table, and the sketches of their texts."""
    texts = [normalize(pair[field] or "") for pair in pairs for field in PAIR_TEXTS]
    words = [text.split() for text in texts]
    prints = Fingerprints(
        np.array(rows, np.int64),
        _hash(texts).reshape(-1, 3),
        _hash([pair["id"] for pair in pairs]),
        np.array([pair["split"] == "eval" for pair in pairs], bool),
        np.array(list(map(_size, texts, words)), np.int32).reshape(-1, 3),
        _hash([f"{pair.get('tools')}\x1f{pair.get('chat_template_kwargs')}" for pair in pairs]),
        np.array([[_is_call(pair, field) for field in COMPLETIONS] for pair in pairs], bool).reshape(-1, 2),
    )
    return prints, _minhash(words).reshape(-1, 3, PERMUTATIONS)


def _is_call(pair: Pair, field: str) -> bool:
    turns = pair.get(f"{field}_turns") or []
    return any(turn.get("tool_calls") for turn in turns) and not any(turn.get("content") for turn in turns)


def _size(text: str, words: Sequence[str]) -> int:
    return len(text) // CHARACTERS_PER_WORD if len(text) > LONG_WORD * len(words) else len(words)


def concatenate(parts: Sequence[Fingerprints]) -> Fingerprints:
    """Concatenate fingerprints."""
    return Fingerprints(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))


def _hash(texts: Sequence[str]) -> NDArray[np.uint64]:
    return pd.util.hash_array(np.array(texts, dtype=object), categorize=False) if texts else np.empty(0, np.uint64)


def _minhash(texts: Sequence[Sequence[str]]) -> Sketches:
    """Return the low 16 bits of the MinHash values [n, PERMUTATIONS] of n texts, given by their words.

    Two different values are equal in these bits once in 65,536 (Li and König 2010, "b-Bit Minwise Hashing").
    """
    words = [text or [""] for text in texts]
    ends = np.cumsum([len(w) for w in words], dtype=np.int64)
    codes, distinct = pd.factorize(np.array([word for w in words for word in w], dtype=object))
    hashes = _hash(list(distinct))[codes]
    shingles = hashes * np.uint64(0x9E3779B97F4A7C15)
    shingles[:-1] += hashes[1:]  # each word with the next one
    shingles[ends - 1] = hashes[ends - 1]  # the last word alone
    rows = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, np.append(0, ends), PERMUTATIONS, SEED
    ).to_rows()
    return np.array(rows, np.uint32).astype(np.uint16).reshape(-1, PERMUTATIONS)


def compare(
    prints: Fingerprints,
    sketches: Sketches,
    similarity: float,
    excluding: frozenset[str],
    read: Read | None = None,
) -> Iterator[Violation]:
    """Find the rows that break a rule of `TABLE_RULES`. The first row of several duplicates is kept.

    Args:
        prints: of all R rows that keep the rules of single rows, in table order.
        sketches: of their texts [R, 3, PERMUTATIONS]. They are large and are never copied.
        similarity: minimum estimated Jaccard similarity of near duplicates.
        excluding: rules; later checks skip a row that breaks one of them.
        read: that of `leaks`.
    """
    positions = prints.row
    checks: tuple[Callable[[Fingerprints], Iterator[Violation]], ...] = (
        lambda rows: _repeats(rows, _combine(rows.read), "duplicate_pair", "the same pair as row {}"),
        lambda rows: _repeats(rows, rows.id, "duplicate_id", "the same id as row {}"),
        _contradictions,
        lambda rows: _near(rows, sketches, np.searchsorted(positions, rows.row), similarity),
        lambda rows: leaks(rows, read),
    )
    for check in checks:
        found = list(check(prints))
        yield from found
        excluded = [violation.row for violation in found if violation.rule in excluding]
        prints = prints.select(~np.isin(prints.row, excluded))


def _combine(columns: NDArray[np.unsignedinteger]) -> NDArray[np.uint64]:
    key = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        key = key * np.uint64(0x9E3779B97F4A7C15) + column
    return key


def _repeats(prints: Fingerprints, key: NDArray[np.uint64], rule: str, reason: str) -> Iterator[Violation]:
    first = pd.Series(prints.row).groupby(key).transform("first").to_numpy()
    for i in np.flatnonzero(first != prints.row):
        yield Violation(int(prints.row[i]), rule, reason.format(first[i] + 1))


def _near(
    prints: Fingerprints, sketches: Sketches, place: NDArray[np.int64], similarity: float
) -> Iterator[Violation]:
    """Find near duplicates; `place` [R] are the rows of their sketches."""
    first = ~pd.Series(_combine(prints.texts)).duplicated().to_numpy()
    prints, place = prints.select(first), place[first]
    original = np.full(len(prints), len(prints))
    for start, side in itertools.product(range(0, PERMUTATIONS, BAND), (1, 2)):
        band = _combine(sketches[place, side, start : start + BAND])
        # The first row of a band may have another prompt, so also compare with the first one of the same prompt.
        for key in (band, _combine(np.stack([band, prints.texts[:, 0]], 1))):
            order = np.argsort(key, kind="stable")  # rows of a key stay in table order
            new = np.append(True, key[order][1:] != key[order][:-1])[: len(order)]
            leader = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
            later, leader = order[~new], leader[~new]
            for part in range(0, len(later), COMPARED_AT_ONCE):
                rows, firsts = (each[part : part + COMPARED_AT_ONCE] for each in (later, leader))
                equal = (sketches[place[rows]] == sketches[place[firsts]]).mean(2).min(1) >= similarity
                np.minimum.at(original, rows[equal], firsts[equal])
    for i in np.flatnonzero(original < len(prints)):
        reason = f"almost the same pair as row {prints.row[original[i]] + 1}"
        yield Violation(int(prints.row[i]), "near_duplicate_pair", reason)


def _contradictions(prints: Fingerprints) -> Iterator[Violation]:
    prompt, chosen, rejected = prints.texts.T
    labelled = bool((prints.words[:, 1:].min(1) == 0).all())  # one completion has no words: the row has a label
    both = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    ordered = _combine(np.stack([prompt, *both, prints.context], 1))
    table = pd.DataFrame({"key": ordered, "flipped": chosen > rejected, "row": prints.row})
    table = table[table.groupby("key")["flipped"].transform("nunique") > 1]
    first = {(key, flipped): row for key, flipped, row in table[::-1].itertuples(index=False)}
    for key, flipped, row in table.itertuples(index=False):
        against = first[key, not flipped] + 1
        other = "has the other label" if labelled else "prefers the other of the same two completions"
        yield Violation(int(row), "contradiction", f"row {against} {other}")


def _generic(prints: Fingerprints) -> NDArray[np.bool_]:
    """Return which completions [R, 2] are absent, tool calls, or stock phrases that are not rare for their length.

    A tool call follows from the request, so equal requests in different conversations have equal calls.
    """
    texts = prints.texts[:, 1:].ravel()
    table = pd.DataFrame({"text": texts, "prompt": np.repeat(prints.texts[:, 0], 2)})
    prompts = table.groupby("text")["prompt"].transform("nunique").to_numpy().reshape(-1, 2)
    words = prints.words[:, 1:]
    needed = np.where(words <= SHORT, PROMPTS_OF_SHORT, np.maximum(PROMPTS, words / WORDS_PER_PROMPT))
    stock: NDArray[np.bool_] = (prompts >= needed) | (words == 0) | prints.calls
    return stock


def leaks(prints: Fingerprints, read: Read | None = None) -> Iterator[Violation]:
    """Find the training rows whose prompt, or one of whose completions, is held out.

    With `read`, short completions that fit any prompt are no leaks. It reads rows of the table of the training
    rows; a held-out row of another table has the position -1.
    """
    trained, held_out = prints.select(~prints.held_out), prints.select(prints.held_out)
    for row in trained.row[np.isin(trained.texts[:, 0], held_out.texts[:, 0])]:
        yield Violation(int(row), "prompt_in_both_splits", "its prompt is held out for evaluation")
    leaked = np.isin(trained.texts[:, 1:], held_out.texts[:, 1:]) & ~_generic(prints)[~prints.held_out]
    if read is not None:
        leaked &= ~_fitting_any_prompt(trained, held_out, leaked, read)
    for row in trained.row[leaked.any(1)]:
        yield Violation(int(row), "eval_text_in_train", "one of its completions is held out for evaluation")


def _fitting_any_prompt(
    trained: Fingerprints, held_out: Fingerprints, leaked: NDArray[np.bool_], read: Read
) -> NDArray[np.bool_]:
    """Return which `leaked` completions [T, 2] of T training rows are short and fit any prompt."""
    short = leaked & (trained.words[:, 1:] <= SHORT_TEXT)
    codes = np.unique(trained.texts[:, 1:][short])
    if not len(codes):
        return short
    sample = trained.row[:: -(-len(trained) // SAMPLED_ROWS)].tolist()
    having = [side.row[np.isin(side.texts[:, 1:], codes).any(1)] for side in (trained, held_out)]
    rows = read({*sample, *np.concatenate(having).tolist()} - {-1})
    texts: dict[str, set[str]] = {}
    for prompt, *completions in (rows[row] for row in np.concatenate(having).tolist() if row in rows):
        for text in map(normalize, completions):
            texts.setdefault(text, set()).add(prompt)
    code_of = dict(zip(_hash(list(texts)).tolist(), texts, strict=True))
    wanted = {code_of[code]: texts[code_of[code]] for code in codes.tolist()}
    fitting = fitting_any_prompt(wanted, (rows[row] for row in sample))
    return short & np.isin(trained.texts[:, 1:], _hash(list(fitting)))
