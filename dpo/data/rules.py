"""The rules of preference data: what each means, how to fix the data, and what happens to a violation."""

from dataclasses import dataclass
from typing import Literal, get_args

Action = Literal["error", "quarantine", "warn"]
"""`error` stops the pipeline, `quarantine` removes the row, `warn` counts it."""
RequiredAction = Literal["error", "quarantine"]
"""Actions of rules whose violations make a row unusable."""
REQUIRED = get_args(RequiredAction)
DATA = ("error", "warn")
"""Actions of rules about all rows together: there is no single row to quarantine."""


@dataclass(frozen=True)
class Rule:
    """One rule, its default action and the actions that `validate.rules` in params.yaml may set."""

    meaning: str
    fix: str
    default: Action = "quarantine"
    allowed: tuple[str, ...] = get_args(Action)


ROW_RULES = {
    "unreadable_row": Rule("every row is one object", "fix or remove the line", allowed=REQUIRED),
    "invalid_utf8": Rule("text is UTF-8", "save the file as UTF-8", allowed=REQUIRED),
    "lone_surrogate": Rule("text has no half of a surrogate pair", "write the full character", allowed=REQUIRED),
    "wrong_type": Rule("every field has the type of its format", "correct the field's type", allowed=REQUIRED),
    "unread_content": Rule(
        "every field with content is read", "name the column in data.columns, or remove it", allowed=REQUIRED
    ),
    "missing_text": Rule("prompt and completions exist", "add the text or remove the row", allowed=REQUIRED),
    "broken_roles": Rule("the user asks and the assistant answers last", "correct the roles", allowed=REQUIRED),
    "no_preference": Rule("one completion is rated higher than another", "remove ties", allowed=REQUIRED),
    "unknown_label": Rule(
        "a label is true or false", "correct it, or set data.min_desirable_rating", allowed=REQUIRED
    ),
    "unknown_split": Rule("the split is train or eval", "use train, eval, test or validation", allowed=REQUIRED),
    "empty_completion": Rule("a completion contains text", "remove the row", allowed=REQUIRED),
    "identical_completions": Rule("completions differ beyond case and space", "remove the row", allowed=REQUIRED),
    "rendered_text": Rule("texts are not rendered with a chat template", "pass turns instead"),
    "control_characters": Rule("text has no control characters", "remove them at the source"),
    "mojibake": Rule("text was decoded with the right encoding", "decode the source again, or run ftfy on it"),
    "special_tokens": Rule("text contains no special token of the tokenizer", "remove the token from the text"),
    "contaminated": Rule("no pair contains a text of a benchmark", "remove it from the data"),
    "template_refuses": Rule(
        "the model's chat template accepts the turns and variables", "see the reason of each row", allowed=REQUIRED
    ),
    "answer_changed": Rule(
        "the chat template keeps every text of a completion", "see the reason of each row", allowed=REQUIRED
    ),
    "tools_unsupported": Rule(
        "the chat template writes tools and calls", "use a model whose template has tools", allowed=REQUIRED
    ),
    "prompt_changed": Rule("the chat template keeps every text of a prompt", "change the turns", "warn"),
    "completion_too_long": Rule(
        "a completion leaves room for the prompt", "raise engine.max_length or drop the row", "error", REQUIRED
    ),
    "prompt_truncated": Rule(
        "prompt and completion fit max_length", "raise engine.max_length or shorten the prompt", "warn"
    ),
}
"""Checked row by row. Rows that break one of them are not checked against the rules below."""

TOKENIZER_RULES = (
    *("special_tokens", "template_refuses", "answer_changed", "tools_unsupported", "prompt_changed"),
    *("completion_too_long", "prompt_truncated"),
)
"""Rules that need a tokenizer."""

TABLE_RULES = {
    "duplicate_id": Rule("every pair has its own id", "give each pair its own id", allowed=REQUIRED),
    "duplicate_pair": Rule("every pair appears once", "remove the repeats"),
    "near_duplicate_pair": Rule("no two pairs are almost the same", "remove the repeats"),
    "contradiction": Rule(
        "no pair reappears with chosen and rejected swapped, and no labelled row with the other label",
        "decide which one is right",
    ),
    "prompt_in_both_splits": Rule("no held-out prompt is trained on", "move all rows of the prompt to one split"),
    "eval_text_in_train": Rule(
        "no held-out completion is trained on, unless it is a stock phrase or a tool call",
        "remove it from the training rows",
    ),
}
"""Checked by comparing rows with each other."""

DATA_RULES = {
    "role_marks": Rule(
        "texts have no role marks, such as `Assistant:`", "remove them, or pass turns", "warn", DATA
    ),
    "length_bias": Rule("chosen is not longer too often; DPO learns length", "balance the lengths", "warn", DATA),
    "label_balance": Rule(
        "neither label is four times as frequent as the other", "weight the labels: losses.kto", "warn", DATA
    ),
    "source_imbalance": Rule(
        "every source is in both splits, without length bias", "balance sources", "warn", DATA
    ),
    "drift": Rule("lengths, sources, prompts are as in the last commit", "check what changed", "warn", DATA),
}
"""Checked on all rows together."""

RULES = ROW_RULES | TABLE_RULES | DATA_RULES
