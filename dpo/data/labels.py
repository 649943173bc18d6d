"""Layouts of labelled rows: a prompt with one completion, or a conversation, and whether it is desirable."""

from __future__ import annotations

import re

from dpo.data.layouts import Layout
from dpo.data.reading import ANY_PROMPT, CONVERSATIONS, Example, Reading, number
from dpo.data.turns import Fields, RowError, shown

ANSWERS = ("completion", "response", "answer", "output")
LABELS = ("label", "kto_tag", "thumbs", "feedback")
RATINGS = ("rating", "score", "stars")
"""Fields of a number. `data.min_desirable_rating` says which numbers are desirable."""
DESIRABLE = ("true", "1", "1.0", "up", "thumbs_up", "👍", "good", "positive", "like", "liked", "yes", "desirable")
UNDESIRABLE = (
    *("false", "0", "0.0", "-1", "-1.0", "down", "thumbs_down", "👎", "bad", "negative", "dislike", "disliked"),
    *("no", "undesirable"),
)
VERDICTS = dict.fromkeys(DESIRABLE, 1.0) | dict.fromkeys(UNDESIRABLE, 0.0)


def answered(row: Reading) -> Example:
    """Read a prompt field and a completion, a text or turns, with a label."""
    name = next((name for name in ANSWERS if name in row.fields), ANSWERS[0])
    return row.example([row.completion(row.fields.required(*ANSWERS), name)], [label(row)])


def conversation(row: Reading) -> Example:
    """Read a conversation with a label. The completion is what follows the last turn of the user."""
    name = next((name for name in CONVERSATIONS if name in row.fields), CONVERSATIONS[0])
    turns = row.with_context(row.turns(row.fields.required(*CONVERSATIONS), name))
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    return Example(turns[: last + 1], [turns[last + 1 :]], [label(row)])


def label(row: Reading) -> float:
    """Return 1 for a desirable row and 0 for an undesirable one.

    Raises:
        RowError: the label is unknown, or it is a number without a threshold.
    """
    name = next((name for name in (*LABELS, *RATINGS) if name in row.fields), LABELS[0])
    value = row.fields.required(*LABELS, *RATINGS)
    word = re.sub(r"[\s-]+(?=[a-z])", "_", str(value).strip().lower())
    if name in RATINGS and not (word in VERDICTS and word.isidentifier()) and word not in ("👍", "👎"):
        rating = number(value, name)
        if row.min_desirable_rating is None:
            raise RowError(
                "unknown_label",
                f"field '{name}' is the number {shown(value)}; set data.min_desirable_rating to the smallest "
                "number that is desirable",
            )
        return float(rating >= row.min_desirable_rating)
    if word not in VERDICTS:
        raise RowError("unknown_label", f"field '{name}' is {shown(value)}, which is neither true nor false")
    return VERDICTS[word]


def _has_label(fields: Fields) -> bool:
    return any(name in fields for name in (*LABELS, *RATINGS))


def _is_answered(fields: Fields) -> bool:
    return _has_label(fields) and all(any(name in fields for name in names) for names in (ANY_PROMPT, ANSWERS))


LABELLED = {
    "labelled completion": Layout(_is_answered, answered),
    "labelled conversation": Layout(
        lambda fields: _has_label(fields) and any(name in fields for name in CONVERSATIONS), conversation
    ),
}
"""Layouts by name. The first one whose fields a row has is used, after those of pairs."""
