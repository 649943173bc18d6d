"""Checks of single rows: the rules about a pair's texts and its length in tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ftfy.badness
import numpy as np
from numpy.typing import NDArray

from dpo.data.formats import COMPLETIONS, PAIR_TEXTS, Pair, normalize
from dpo.engine.tokenization import pair_ids, without_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")


class Violation(NamedTuple):
    """A row that breaks a rule."""

    row: int
    """Position in the raw table, from 0."""
    rule: str
    reason: str


def check_texts(pair: Mapping[str, Any], special: re.Pattern[str], end: str | None) -> list[tuple[str, str]]:
    """Return the rules that a pair's texts break, each with the reason.

    `special` is from `special_tokens`. The end token `end` is allowed at the end of a completion.
    """
    empty = [field for field in COMPLETIONS if not pair[field].strip()]
    broken = [("empty_completion", f"field '{field}' contains no text") for field in empty]
    if not broken and normalize(pair["chosen"]) == normalize(pair["rejected"]):
        broken.append(("identical_completions", "chosen and rejected differ at most in case and space"))
    for field in PAIR_TEXTS:
        text = pair[field]
        if found := CONTROL.search(text):
            code = f"U+{ord(found[0]):04X}"
            broken.append(("control_characters", f"field '{field}', character {found.start()}: {code}"))
        if not text.isascii() and ftfy.badness.is_bad(text):
            start = next(i for i, c in enumerate(text) if not c.isascii())
            excerpt = text[max(0, start - 10) : start + 20]
            broken.append(("mojibake", f"field '{field}' looks wrongly decoded: {excerpt!r}"))
        if found := special.search(text if field == "prompt" else without_end(text, end)):
            broken.append(("special_tokens", f"field '{field}', character {found.start()}: {found[0]}"))
    return broken


def special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str]:
    """Return a pattern that matches a tokenizer's special tokens, or nothing if there is no tokenizer.

    In a text they would be encoded as control tokens.
    """
    if tokenizer is None:
        return re.compile(r"(?!)")
    names = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def token_lengths(tokenizer: PreTrainedTokenizerBase | None, pairs: Sequence[Pair]) -> NDArray[np.int32]:
    """Return the number of tokens of prompt, chosen and rejected, exactly as in training, shape [R, 3].

    Without a tokenizer, return the number of characters.
    """
    texts = ([pair[field] for field in PAIR_TEXTS] for pair in pairs)
    rows = texts if tokenizer is None else pair_ids(tokenizer, pairs)
    return np.array([[len(text) for text in row] for row in rows], np.int32).reshape(-1, 3)


def check_lengths(tokens: Sequence[int], max_length: int) -> list[tuple[str, str]]:
    """Return the rules about `max_length` that a pair's numbers of tokens break, each with the reason."""
    prompt, chosen, rejected = tokens
    longer = max(chosen, rejected)
    excess = prompt + longer - max_length
    if longer >= max_length:
        field = COMPLETIONS[rejected > chosen]
        return [("completion_too_long", f"field '{field}' has {longer} tokens, max_length is {max_length}")]
    if excess > 0:
        return [("prompt_truncated", f"the prompt loses {excess} of {prompt} tokens, max_length is {max_length}")]
    return []
