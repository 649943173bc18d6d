"""The rules of preference data: what each means, how to mend a breach, and the checks of single rows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ftfy.badness
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dpo.data.formats import Pair, normal
from dpo.engine.tokenization import pair_ids, without_end

COMPLETIONS = ("chosen", "rejected")
TEXTS = ("prompt", *COMPLETIONS)
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class Rule:
    """What a rule asks and what to do about a breach."""

    means: str
    mend: str


ROW_RULES = {
    "unreadable_row": Rule("a row is one object", "mend or remove the line"),
    "invalid_utf8": Rule("text is UTF-8", "save the file as UTF-8"),
    "lone_surrogate": Rule("no half of a surrogate pair stands in a text", "write the character whole"),
    "wrong_type": Rule("every field has its type", "write the field as the format says"),
    "missing_text": Rule("prompt and completions are there", "fill in or remove the row"),
    "broken_roles": Rule("turns alternate, from the user to one assistant answer", "mend the conversation"),
    "no_preference": Rule("one completion is rated higher than another", "remove ties"),
    "unknown_split": Rule("a split is train or eval", "name the split train, eval, test or validation"),
    "empty_completion": Rule("a completion holds text", "remove the row"),
    "identical_completions": Rule("chosen and rejected differ in more than case and space", "remove the row"),
    "control_characters": Rule("no control characters", "strip them at the source"),
    "mojibake": Rule("no text was decoded wrongly", "decode the source as what it is, or run ftfy over it"),
    "special_tokens": Rule("no text holds a special token of the tokenizer", "remove the token from the text"),
    "completion_too_long": Rule(
        "a completion leaves room for the prompt", "raise engine.max_length or drop the row"
    ),
    "prompt_truncated": Rule(
        "prompt and completion fit max_length", "raise engine.max_length or shorten the prompt"
    ),
}
"""Checked row by row. Rows that break one are left out of the rules below."""

TABLE_RULES = {
    "duplicate_id": Rule("an id names one pair", "give each pair its own id"),
    "duplicate_pair": Rule("a pair stands there once", "remove the repeats"),
    "near_duplicate_pair": Rule("no two pairs are almost the same", "remove the repeats"),
    "contradiction": Rule("no pair stands there with its preference flipped", "decide which one is right"),
    "prompt_in_both_splits": Rule(
        "a held-out prompt is not trained on", "move all rows of the prompt to one split"
    ),
    "eval_text_in_train": Rule("a held-out completion is not trained on", "remove it from the training rows"),
}
"""Checked row against row."""

DATA_RULES = {
    "length_bias": Rule("chosen is not the longer one too often; DPO learns length", "balance the lengths"),
    "source_imbalance": Rule("every source is in both splits and of one mind about length", "balance the sources"),
    "drift": Rule("lengths, sources and prompts are like those of the last committed version", "see what changed"),
}
"""Checked on the data as a whole."""

RULES = ROW_RULES | TABLE_RULES | DATA_RULES


class Finding(NamedTuple):
    """One breach of a rule by one row."""

    row: int
    """Position in the candidate table, from 0."""
    rule: str
    reason: str


def check_texts(pair: Mapping[str, Any], special: re.Pattern[str], end: str | None) -> list[tuple[str, str]]:
    """Rules that a pair's texts break, each with the reason; an end token that ends a completion is none."""
    broken = []
    for field in COMPLETIONS:
        if not pair[field].strip():
            broken.append(("empty_completion", f"field '{field}' holds no text"))
    if not broken and normal(pair["chosen"]) == normal(pair["rejected"]):
        broken.append(("identical_completions", "chosen and rejected are the same but for case and space"))
    for field in TEXTS:
        text = pair[field]
        if found := CONTROL.search(text):
            broken.append(
                ("control_characters", f"field '{field}', character {found.start()}: U+{ord(found[0]):04X}")
            )
        if not text.isascii() and ftfy.badness.is_bad(text):
            broken.append(("mojibake", f"field '{field}' looks wrongly decoded: {_excerpt(text)!r}"))
        if found := special.search(text if field == "prompt" else without_end(text, end)):
            broken.append(("special_tokens", f"field '{field}', character {found.start()}: {found[0]}"))
    return broken


def _excerpt(text: str) -> str:
    start = next(i for i, c in enumerate(text) if not c.isascii())
    return text[max(0, start - 10) : start + 20]


def special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str]:
    """Matches the special tokens of a tokenizer; in a text they would become control tokens. None has none."""
    if tokenizer is None:
        return re.compile(r"(?!)")
    names = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def token_lengths(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> NDArray[np.int32]:
    """Tokens of prompt, chosen and rejected, exactly as training sees them, shape [R, 3]."""
    return np.array([[len(ids) for ids in row] for row in pair_ids(tokenizer, pairs)], np.int32).reshape(-1, 3)


def check_lengths(tokens: Sequence[int], max_length: int) -> list[tuple[str, str]]:
    """Rules about `max_length` that a pair's tokens of prompt, chosen and rejected break, each with the reason."""
    prompt, chosen, rejected = tokens
    longer = max(chosen, rejected)
    if longer >= max_length:
        field = COMPLETIONS[rejected > chosen]
        return [("completion_too_long", f"field '{field}' has {longer} tokens, max_length is {max_length}")]
    if prompt + longer > max_length:
        cut = prompt + longer - max_length
        return [("prompt_truncated", f"the prompt loses {cut} of {prompt} tokens, max_length is {max_length}")]
    return []
