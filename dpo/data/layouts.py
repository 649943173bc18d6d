"""Layouts of preference data: functions from the fields of a row to a prompt with two or more completions.

Prompt fields have the same spellings in every layout (`Reading.prompt`); a layout says where the completions and
their order come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo.data.annotations import argilla, is_argilla, label_studio
from dpo.data.reading import (
    ANY_PROMPT,
    CHOSEN,
    CONVERSATIONS,
    RANK_LISTS,
    REJECTED,
    RESPONSE_LISTS,
    SCORE_LISTS,
    SCORES,
    SYSTEMS,
    TEXTS,
    Example,
    Reading,
    number,
    side,
)
from dpo.data.turns import Fields, RowError, from_json, shown, text_of

CHOICES = {
    ("response1", "response2", "overall_preference"): lambda value: -number(value, "overall_preference"),
    ("response_0", "response_1", "better_response_id"): lambda value: 0.5 - number(value, "better_response_id"),
    ("response_0", "response_1", "safer_response_id"): lambda value: 0.5 - number(value, "safer_response_id"),
    ("response_1", "response_2", "preference_strength"): lambda value: -number(value, "preference_strength"),
    ("human_ref_A", "human_ref_B", "labels"): lambda value: number(value, "labels") - 0.5,
    ("response_a", "response_b", "winner"): lambda value: side(value, "winner"),
    ("conversation_a", "conversation_b", "winner"): lambda value: side(value, "winner"),
}
"""Two completions and the field that compares them: the result is above 0 if the first one is better, 0 for a tie.
HelpSteer3, PKU-SafeRLHF (two), HelpSteer2's preferences, SHP, Chatbot Arena (two)."""


def pairs(row: Reading) -> Example:
    """Read `chosen` and `rejected`: texts, turns, whole conversations or transcripts, with or without a prompt.

    `rejected` may be a list of texts or conversations, each of which is paired with `chosen`.
    """
    chosen = row.fields.required(*CHOSEN)
    if isinstance(chosen, list) and len(chosen) == 1 and isinstance(chosen[0], str):
        (chosen,) = chosen
    completions = [row.completion(chosen, "chosen"), *row.rejected()]
    return row.example(completions, [1.0, *[0.0] * (len(completions) - 1)])


def swift(row: Reading) -> Example:
    """Read ms-swift: `messages` or `query` and `response`, with `rejected_response` or `rejected_messages`."""
    fields = row.fields
    if "query" in fields:
        prompt, chosen = row.prompt(), row.completion(fields.required("response"), "response")
    else:
        turns = row.with_context(row.turns(fields.required(*CONVERSATIONS), "messages"))
        prompt, chosen = turns[:-1], turns[-1:]
    completions = [chosen, *row.rejected()]
    return Example(prompt, completions, [1.0, *[0.0] * (len(completions) - 1)])


def openai(row: Reading) -> Example:
    """Read OpenAI's preference format: `input` with messages and tools, `preferred_output` and the other one."""
    given = from_json(row.fields.required("input"))
    if not isinstance(given, Mapping):
        raise RowError("wrong_type", f"field 'input' is {shown(given)}, not an object with messages")
    inner = Fields(given, "input.")
    prompt = row.turns(inner.required("messages"), "input.messages")
    row.tools = inner.get("tools")
    inner.get("parallel_tool_calls")
    row.unread |= set(inner.unread())
    outputs = [
        row.completion(row.fields.required(name), name) for name in ("preferred_output", "non_preferred_output")
    ]
    return Example(prompt, outputs, [1.0, 0.0])


def rated(row: Reading) -> Example:
    """Read several completions: objects with a score or a rank each, or texts with lists of scores or ranks."""
    name = next((name for name in RESPONSE_LISTS if name in row.fields), RESPONSE_LISTS[0])
    items = from_json(row.fields.required(name))
    if not isinstance(items, list):
        raise RowError("wrong_type", f"field '{name}' is {type(items).__name__}, not a list")
    if all(isinstance(item, Mapping) for item in items):
        return _rated_objects(row, items, name)
    list_name = next((each for each in (*SCORE_LISTS, *RANK_LISTS) if each in row.fields), SCORE_LISTS[0])
    values = from_json(row.fields.required(list_name))
    if not isinstance(values, list) or len(values) != len(items):
        raise RowError("wrong_type", f"{len(items)} {name} have {shown(values)} as {list_name}")
    numbers = [number(value, list_name) for value in values]
    ranks = list_name in RANK_LISTS
    scores = [-value for value in numbers] if ranks else numbers
    return Example(row.prompt(), [row.completion(item, name) for item in items], scores, is_rating=not ranks)


def _rated_objects(row: Reading, items: list[Any], name: str) -> Example:
    completions, scores, systems, is_rating = [], [], [], True
    for item in items:
        fields = Fields(item, f"{name}.")
        completions.append(row.completion(fields.required(*TEXTS), name))
        score = fields.get(*SCORES)
        if score is None and "rank" in fields:
            is_rating, score = False, -number(fields["rank"], f"{name}.rank")
        if score is None:
            raise RowError("missing_text", f"field '{name}' contains an item without a score")
        scores.append(number(score, f"{name}.score"))
        system = fields.get("custom_system_prompt", *SYSTEMS)
        systems.append(None if system is None else text_of(system, f"{name}.system"))
        row.unread |= set(fields.unread())
    return Example(row.prompt(), completions, scores, is_rating, systems if any(systems) else None)


def ranked_outputs(row: Reading) -> Example:
    """Read Alpaca rankings: `output` is a list, the best one first."""
    completions = [row.completion(item, "output") for item in from_json(row.fields.required("output"))]
    return Example(row.prompt(), completions, [float(-rank) for rank in range(len(completions))])


def compared(row: Reading) -> Example:
    """Read two completions and a field that says which one is better, as `CHOICES` lists them."""
    found = [names for names in CHOICES if all(name in row.fields for name in names[:2])] or list(CHOICES)
    first, second, choice = next((names for names in found if names[2] in row.fields), found[0])
    preference = CHOICES[first, second, choice](row.fields.required(choice))
    completions = [row.completion(row.fields.required(name), name) for name in (first, second)]
    return row.example(completions, [preference, 0.0])


@dataclass(frozen=True)
class Layout:
    """A layout: the fields that a row needs, and the function that reads it."""

    needs: Callable[[Fields], bool]
    read: Callable[[Reading], Example]


def _has(*alternatives: tuple[str, ...]) -> Callable[[Fields], bool]:
    return lambda fields: all(any(name in fields for name in names) for names in alternatives)


def _has_ratings(fields: Fields) -> bool:
    """Return whether there are lists of completions with scores or ranks, or a list of rated objects."""
    items = next((from_json(fields.peek(name)) for name in RESPONSE_LISTS if name in fields), None)
    objects = isinstance(items, list) and any(isinstance(item, Mapping) for item in items)
    return items is not None and (objects or _has((*SCORE_LISTS, *RANK_LISTS))(fields))


def _has_ranked_outputs(fields: Fields) -> bool:
    outputs = from_json(fields.peek("output"))
    return isinstance(outputs, list) and len(outputs) > 1


LAYOUTS = {
    "OpenAI": Layout(_has(("input",), ("preferred_output",), ("non_preferred_output",)), openai),
    "ms-swift": Layout(
        lambda fields: _has(("rejected_response", "rejected_messages"))(fields) and not _has(CHOSEN)(fields), swift
    ),
    "pairs": Layout(_has(CHOSEN, REJECTED), pairs),
    "rated completions": Layout(lambda fields: _has(ANY_PROMPT)(fields) and _has_ratings(fields), rated),
    "ranked outputs": Layout(
        lambda fields: _has(ANY_PROMPT)(fields) and _has_ranked_outputs(fields), ranked_outputs
    ),
    "Label Studio": Layout(
        lambda fields: _has(("data",), ("annotations",))(fields) or _has(("comparison",), ("answer1",))(fields),
        label_studio,
    ),
    "Argilla": Layout(is_argilla, argilla),
    "compared completions": Layout(
        lambda fields: any(first in fields and second in fields for first, second, _ in CHOICES), compared
    ),
}
"""Layouts by name. The first one whose fields a row has is used."""
