"""Layouts of demonstrations for supervised fine-tuning: a prompt with one completion, or a conversation.

Rows in a layout of preference data are read, too; the best completion is then the demonstration.
"""

from dpo.data.layouts import Layout
from dpo.data.reading import ANY_PROMPT, CONVERSATIONS, Example, Reading
from dpo.data.turns import Fields, RowError

ANSWERS = ("completion", "response", "answer", "output", "chosen")
LABELS = ("label", "kto_tag")


def answered(row: Reading) -> Example:
    """Read a prompt field and a completion: a text, or turns."""
    name = next((name for name in ANSWERS if name in row.fields), ANSWERS[0])
    _check_label(row.fields)
    return row.example([row.completion(row.fields.required(*ANSWERS), name)], [1.0])


def conversation(row: Reading) -> Example:
    """Read a conversation that ends with an assistant turn."""
    name = next((name for name in CONVERSATIONS if name in row.fields), CONVERSATIONS[0])
    _check_label(row.fields)
    return Example([], [row.with_context(row.turns(row.fields.required(*CONVERSATIONS), name))], [1.0])


def _check_label(fields: Fields) -> None:
    """Raise RowError if a field says whether the completion is good, as in data for KTO."""
    if label := next((name for name in LABELS if name in fields), None):
        fix = "keep the rows with a good completion, and remove the field"
        raise RowError("unread_content", f"field '{label}' says whether the completion is good; {fix}")


def _is_answered(fields: Fields) -> bool:
    return any(name in fields for name in ANY_PROMPT) and any(name in fields for name in ANSWERS)


DEMONSTRATIONS = {
    "prompt and completion": Layout(_is_answered, answered),
    "conversation": Layout(lambda fields: any(name in fields for name in CONVERSATIONS), conversation),
}
"""Layouts by name. The first one whose fields a row has is used."""
