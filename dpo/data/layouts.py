"""Layouts of preference data: functions from the fields of a row to a prompt with two or more completions.

Prompt fields have the same spellings in every layout (`Reading.prompt`); a layout says where the completions and
their order come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo.data.turns import (
    Fields,
    RowError,
    Turn,
    conversation_from_json,
    from_json,
    is_transcript,
    parse_transcript,
    read_turns,
    shown,
    storable,
    text_of,
)

PROMPTS = ("prompt", "instruction", "question", "query")
CONVERSATIONS = ("messages", "conversations", "conversation", "context")
SYSTEMS = ("system", "system_prompt")
CHOSEN = ("chosen", "preferred", "chosen_response", "preferred_output")
REJECTED = ("rejected", "dispreferred", "rejected_response", "non_preferred_output", "rejected_messages")
RESPONSE_LISTS = ("completions", "responses", "generations", "answers")
TEXTS = ("response", "text", "content", "completion", "answer", "output")
SCORES = ("score", "overall_score", "rating")
SCORE_LISTS = ("scores", "ratings")
RANK_LISTS = ("ranks", "rankings", "rank")
CHOICES = {
    ("response1", "response2", "overall_preference"): lambda value: -number(value, "overall_preference"),
    ("response_0", "response_1", "better_response_id"): lambda value: 0.5 - number(value, "better_response_id"),
    ("human_ref_A", "human_ref_B", "labels"): lambda value: number(value, "labels") - 0.5,
    ("response_a", "response_b", "winner"): lambda value: _side(value, "winner"),
    ("conversation_a", "conversation_b", "winner"): lambda value: _side(value, "winner"),
    ("answer1", "answer2", "selected"): lambda value: _side(value, "selected"),
}
"""Two completions and the field that compares them: the result is above 0 if the first one is better, 0 for a tie.
HelpSteer3, PKU-SafeRLHF, SHP, Chatbot Arena (two) and Label Studio."""
SIDES = dict.fromkeys(("a", "model_a", "left", "1", "first"), 1.0) | dict.fromkeys(
    ("b", "model_b", "right", "2", "second"), -1.0
)


@dataclass
class Example:
    """A prompt with its completions, as a row has them."""

    prompt: list[Turn]
    """The turns before the completions. Empty if the completions are whole conversations."""
    completions: list[list[Turn]]
    scores: list[float]
    """Score of each completion, higher is better."""
    is_rating: bool = False
    """Whether the scores are ratings, and not ranks or a choice."""
    systems: list[str | None] | None = None
    """The system prompt of each completion, if they have their own."""


@dataclass
class Reading:
    """A row while it is read.

    Attributes:
        fields: its fields.
        roles: role by its name in the source.
        unread: keys of turns that were not read.
        notes: what was removed from the texts.
        tools: tools in a place of their own.
        is_transcript: whether a text was a `Human:` and `Assistant:` transcript.
    """

    fields: Fields
    roles: Mapping[str, str]
    unread: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    tools: list[Any] | None = None
    is_transcript: bool = False

    def turns(self, value: Any, name: str) -> list[Turn]:
        """Return the turns of a conversation, of its JSON, of a transcript, or of a text by the user."""
        return self._turns(value, name, "user")

    def completion(self, value: Any, name: str) -> list[Turn]:
        """Return the turns of a completion. A text is one assistant turn."""
        return self._turns(value, name, "assistant")

    def _turns(self, value: Any, name: str, role: str) -> list[Turn]:
        value = conversation_from_json(value)
        if value is None:
            raise RowError("missing_text", f"field '{name}' contains null instead of a text")
        if isinstance(value, str) and is_transcript(value):
            self.is_transcript = True
            return parse_transcript(storable(value, name), name)
        if isinstance(value, str):
            return [{"role": role, "content": storable(value, name)}]
        return read_turns(value, name, self.roles, self.unread)

    def prompt(self) -> list[Turn]:
        """Return the turns before the completions: system, earlier turns, and the prompt with its input."""
        fields = self.fields
        name = next((name for name in (*PROMPTS, *CONVERSATIONS, "history") if name in fields), "prompt")
        turns = self.turns(fields.required(*PROMPTS, *CONVERSATIONS, "history"), name)
        if name in PROMPTS and isinstance(fields.peek("input"), str):
            turns[-1]["content"] = "\n\n".join([turns[-1]["content"], text_of(fields["input"], "input")])
        return self.with_context(turns)

    def with_context(self, turns: list[Turn]) -> list[Turn]:
        """Add the system prompt and the earlier turns that have fields of their own."""
        if isinstance(history := from_json(self.fields.peek("history")), list):
            self.fields.get("history")
            turns = [turn for item in history for turn in self._exchange(item)] + turns
        if (system := self.fields.get(*SYSTEMS)) is not None:
            turn = {"role": "system", "content": text_of(system, "system")}
            turns = turns if turns[:1] == [turn] else [turn, *turns]
        return turns

    def _exchange(self, item: Any) -> list[Turn]:
        """Return the turns of an item of `history`: a turn, or a question with its answer."""
        if isinstance(item, list) and len(item) == 2:
            texts = zip(("user", "assistant"), item, strict=True)
            return [{"role": role, "content": text_of(text, "history")} for role, text in texts]
        return self.turns(item, "history")

    def has_prompt(self) -> bool:
        """Return whether a field holds the prompt."""
        return any(name in self.fields for name in (*PROMPTS, *CONVERSATIONS))


def pairs(row: Reading) -> Example:
    """Read `chosen` and `rejected`: texts, turns, whole conversations or transcripts, with or without a prompt.

    `rejected` may be a list of texts or conversations, each of which is paired with `chosen`.
    """
    chosen, rejected = row.fields.required(*CHOSEN), row.fields.required(*REJECTED)
    if isinstance(rejected, list) and all(isinstance(item, str | list) for item in rejected):
        others = [row.completion(item, "rejected") for item in rejected]
    else:
        others = [row.completion(rejected, "rejected")]
    completions = [row.completion(chosen, "chosen"), *others]
    return _choice(row, completions, [1.0, *[0.0] * len(others)])


def _choice(row: Reading, completions: list[list[Turn]], scores: list[float]) -> Example:
    """Return the example of completions that may be whole conversations, in a row that may have a prompt."""
    starts = {turns[0]["role"] for turns in completions if turns}
    if starts == {"assistant"} or row.has_prompt():
        return Example(row.prompt(), completions, scores)
    context = row.with_context([])
    return Example(
        [], [turns if turns[: len(context)] == context else context + turns for turns in completions], scores
    )


def swift(row: Reading) -> Example:
    """Read ms-swift: `messages` or `query` and `response`, with `rejected_response` or `rejected_messages`."""
    fields = row.fields
    if "query" in fields:
        prompt, chosen = row.prompt(), row.completion(fields.required("response"), "response")
    else:
        turns = row.with_context(row.turns(fields.required("messages"), "messages"))
        prompt, chosen = turns[:-1], turns[-1:]
    rejected = row.completion(fields.required(*REJECTED), "rejected_response")
    return Example(prompt, [chosen, rejected], [1.0, 0.0])


def openai(row: Reading) -> Example:
    """Read OpenAI's preference format: `input` with messages and tools, `preferred_output` and the other one."""
    given = row.fields.required("input")
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
    completions = [row.completion(item, "output") for item in row.fields.required("output")]
    return Example(row.prompt(), completions, [float(-rank) for rank in range(len(completions))])


def compared(row: Reading) -> Example:
    """Read two completions and a field that says which one is better, as `CHOICES` lists them."""
    found = (names for names in CHOICES if all(name in row.fields for name in names[:2]))
    first, second, choice = next(found, next(iter(CHOICES)))
    preference = CHOICES[first, second, choice](row.fields.required(choice))
    completions = [row.completion(row.fields.required(name), name) for name in (first, second)]
    return _choice(row, completions, [preference, 0.0])


def label_studio(row: Reading) -> Example:
    """Read an export of Label Studio: `data` with prompt and answers, `annotations` with the selected side."""
    annotations, data = row.fields.required("annotations"), row.fields.required("data")
    try:
        sides = [
            value["selected"]
            for annotation in annotations
            for result in annotation["result"]
            if "selected" in (value := result["value"])
        ]
        data = dict(data)
    except (TypeError, KeyError, ValueError) as error:
        raise RowError("wrong_type", "field 'annotations' has no result with a selected side") from error
    if len(set(sides)) != 1:
        raise RowError(
            "no_preference",
            f"{len(sides)} annotations select {', '.join(sorted(set(map(str, sides)))) or 'nothing'}",
        )
    inner = Reading(Fields({**data, "selected": sides[0]}, "data."), row.roles, row.unread, row.notes)
    example = compared(inner)
    row.unread |= set(inner.fields.unread())
    return example


def _side(value: Any, name: str) -> float:
    side = SIDES.get(str(value).lower())
    if side is None:
        raise RowError("no_preference", f"field '{name}' is {shown(value)}, so no completion is better")
    return side


def number(value: Any, name: str) -> float:
    """Return a finite number, also if it is written as text.

    Raises:
        RowError: the value is something else.
    """
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise RowError("wrong_type", f"field '{name}' is {shown(value)}, not a number")
    return result


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
    return isinstance(fields.peek("output"), list) and len(fields.peek("output")) > 1


ANY_PROMPT = (*PROMPTS, *CONVERSATIONS)
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
    "Label Studio": Layout(_has(("data",), ("annotations",)), label_studio),
    "compared completions": Layout(
        lambda fields: any(first in fields and second in fields for first, second, _ in CHOICES), compared
    ),
}
"""Layouts by name. The first one whose fields a row has is used."""
