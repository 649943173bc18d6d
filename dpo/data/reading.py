"""What layouts read: the fields of a row by their names in data sets, its prompt, and its completions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
CONVERSATIONS = ("messages", "conversations", "conversation", "context", "contents", "chat", "dialogue", "dialog")
ANY_PROMPT = (*PROMPTS, *CONVERSATIONS, "input")
"""Fields of the prompt. `input` is the prompt if there is no other one, and else a part of an instruction."""
SYSTEMS = ("system", "system_prompt", "system_message", "sys_prompt", "system_instruction")
CHOSEN = ("chosen", "preferred", "chosen_response", "chosen_messages", "preferred_output")
REJECTED = ("rejected", "dispreferred", "rejected_response", "non_preferred_output", "rejected_messages")
RESPONSE_LISTS = ("completions", "responses", "generations", "answers")
TEXTS = ("response", "text", "content", "completion", "answer", "output")
SCORES = ("score", "overall_score", "rating", "pm_score")
TOOLS = ("tools", "functions")
VARIABLES = ("chat_template_kwargs", "template_kwargs")
RESERVED = frozenset(
    (
        "add_generation_prompt", "bos_token", "chat_template", "continue_final_message", "conversation",
        "documents", "eos_token", "max_length", "messages", "pad_token", "padding", "return_assistant_tokens_mask",
        "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools",
        "truncation", "unk_token",
    )
)  # fmt: skip
"""Variables that a row must not set, because the pipeline or the tokenizer sets them."""
SCORE_LISTS = ("scores", "ratings", "rating")
RANK_LISTS = ("ranks", "rankings", "rank")
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
        conversations: the prompt of each pair, and the prompt with each of its completions.
        is_transcript: whether a text was a `Human:` and `Assistant:` transcript.
        min_desirable_rating: smallest number that is a desirable rating.
    """

    fields: Fields
    roles: Mapping[str, str]
    unread: set[str] = field(default_factory=set)
    notes: set[str] = field(default_factory=set)
    tools: list[Any] | None = None
    conversations: list[list[Turn]] = field(default_factory=list)
    is_transcript: bool = False
    min_desirable_rating: float | None = None

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
        name = next((name for name in (*ANY_PROMPT, "history") if name in fields), "prompt")
        turns = self.turns(fields.required(*ANY_PROMPT, "history"), name)
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
        return any(name in self.fields for name in ANY_PROMPT)

    def is_copy(self, value: Any, name: str) -> bool:
        """Return whether a value is one of `conversations`."""
        turns = self.turns(value, name)
        return any(len(turns) == len(whole) and all(map(same, turns, whole)) for whole in self.conversations)

    def rejected(self) -> list[list[Turn]]:
        """Return the rejected completion, or several of a list of texts or conversations."""
        value = self.fields.required(*REJECTED)
        value = _texts_from_json(
            value, next((self.fields.peek(name) for name in CHOSEN if name in self.fields), None)
        )
        several = isinstance(value, list) and all(isinstance(item, str | list) for item in value)
        return [self.completion(item, "rejected") for item in (value if several else [value])]

    def example(self, completions: list[list[Turn]], scores: list[float]) -> Example:
        """Return the example of completions that may be whole conversations, in a row that may have a prompt."""
        starts = {turns[0]["role"] for turns in completions if turns}
        if starts == {"assistant"} or self.has_prompt():
            return Example(_without_answer(self.prompt(), completions), completions, scores)
        context = self.with_context([])
        return Example(
            [], [turns if turns[: len(context)] == context else context + turns for turns in completions], scores
        )


def _texts_from_json(value: Any, chosen: Any) -> Any:
    """Return the texts of a JSON list, as CSV files have several answers, if the chosen answer is not JSON."""
    texts = from_json(value.strip()) if isinstance(value, str) else value
    is_json = isinstance(chosen, str) and chosen.lstrip().startswith(("[", "{", "```"))
    several = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    return texts if several and not is_json else value


def _without_answer(prompt: list[Turn], completions: list[list[Turn]]) -> list[Turn]:
    """Return a prompt without its last turn if that is a completion, as in a copy of the conversation."""
    answer = prompt[-1:]
    ends = [turns[-1:] if turns[0]["role"] == "assistant" else turns[len(prompt) - 1 :] for turns in completions]
    is_copy = any(len(end) == 1 and all(map(same, answer, end)) for end in ends)
    return prompt[:-1] if answer and answer[0]["role"] == "assistant" and is_copy else prompt


def same(turn: Turn, other: Turn) -> bool:
    """Return whether two turns are equal, apart from white space around their content."""
    return {**turn, "content": turn["content"].strip()} == {**other, "content": other["content"].strip()}


def read_tools(value: Any) -> list[Any] | None:
    """Return tools as {type, function}, as chat templates expect them."""
    tools = from_json(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("wrong_type", f"field 'tools' is {shown(tools)}, not a list of objects")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def read_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Return the variables of the chat template that a row sets. Null values, which Parquet adds, are left out."""
    value = from_json(value)
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise RowError("wrong_type", f"field '{VARIABLES[0]}' is {shown(value)}, not an object of variables")
    if taken := RESERVED & value.keys():
        raise RowError("wrong_type", f"field '{VARIABLES[0]}' sets '{min(taken)}', which the pipeline sets")
    given = {name: each for name, each in value.items() if each is not None}
    try:
        storable(json.dumps(given, ensure_ascii=False), VARIABLES[0])
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("wrong_type", f"field '{VARIABLES[0]}' cannot be written as JSON: {error}") from error
    return given or None


def side(value: Any, name: str) -> float:
    """Return 1 for the first side and -1 for the second one.

    Raises:
        RowError: the value is neither.
    """
    if (found := SIDES.get(str(value).lower())) is None:
        raise RowError("no_preference", f"field '{name}' is {shown(value)}, so no completion is better")
    return found


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
