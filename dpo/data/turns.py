"""Turns of conversations in the spellings of data sets: keys, roles, parts, tool calls, transcripts, JSON."""

import ast
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

Turn = dict[str, Any]
"""`role` and `content`, and if the turn has them `reasoning_content`, `tool_calls`, `tool_call_id` and `name`."""

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response", "function_response"), "tool"),
}
"""Role by its name in data sets. `data.roles` adds others."""
CALLS = ("function_call", "tool_call")
"""Roles of turns whose content is one call of the assistant."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "message", "parts")
TEXT_KEYS = ("text", "value")
"""Keys of the text of a part."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

PYTHON_TURNS = re.compile(r"\[?\s*\{\s*'(role|from|content|value)'\s*:\s*['\"]")
"""The start of turns as Python writes them."""
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ANSWER = "\n\nAssistant:"
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(Exception):
    """A row cannot be converted to pairs. `rule` is the rule that it breaks, `reason` says how."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule, self.reason = rule, reason


class Fields:
    """The fields of a row that have a value. Reading one marks it as read.

    Null, NaN, empty texts, lists and objects are no value: tables use them for fields that a row does not have.
    """

    def __init__(self, row: Mapping[str, Any], prefix: str = "", *, keep_empty: bool = False) -> None:
        self._given = row
        self._row = {
            name: value for name, value in row.items() if _has_value(value) or (keep_empty and value == "")
        }
        self.prefix, self._unread = prefix, set(self._row)

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def __getitem__(self, name: str) -> Any:
        self._unread.discard(name)
        return self._row[name]

    def peek(self, name: str) -> Any:
        """Return the value of a field, or None, without marking it as read."""
        return self._row.get(name)

    def get(self, *names: str) -> Any:
        """Return the value of the first of these fields that has one, or None. Mark the field as read."""
        name = next((name for name in names if name in self._row), None)
        return None if name is None else self[name]

    def required(self, *names: str) -> Any:
        """Return the value of the first of these fields that the row has, also if it is an empty text.

        Raises:
            RowError: the row has none of them, or null.
        """
        if (value := self.get(*names)) is not None:
            return value
        if any(self._given.get(name) == "" for name in names):
            return ""
        raise RowError("missing_text", f"field '{self.prefix}{names[0]}' is missing or null")

    def unread_names(self) -> list[str]:
        """Return the names of the fields with a value that were not read, without prefix."""
        return [name for name in self._row if name in self._unread]

    def unread(self) -> list[str]:
        """Return the names of the fields with a value that were not read."""
        return [f"{self.prefix}{name}" for name in self.unread_names()]


def _has_value(value: Any) -> bool:
    return value is not None and value == value and (value or isinstance(value, int | float))


def read_turns(value: Any, field: str, roles: Mapping[str, str], unread: set[str]) -> list[Turn]:
    """Return the turns of a list of turns or of one turn. Add the keys that are not read to `unread`.

    Raises:
        RowError: an item is not a turn, has an unknown role, or content other than text.
    """
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(items, list) and any(isinstance(item, Mapping) and "output" in item for item in items):
        items = [turn for item in items for turn in _exchange(item)]
    if not isinstance(items, list):
        raise RowError("wrong_type", f"field '{field}' is {type(value).__name__} {shown(value)}, not turns")
    return [_read_turn(item, field, roles, unread) for item in items]


def _exchange(item: Any) -> list[Any]:
    """Return the turns of an item with `input` and `output`, and any other item as it is."""
    if not isinstance(item, Mapping) or item.keys() != {"input", "output"}:
        return [item]
    texts = zip(("user", "assistant"), (item["input"], item["output"]), strict=True)
    return [{"role": role, "content": text} for role, text in texts if text is not None]


def _read_turn(item: Any, field: str, roles: Mapping[str, str], unread: set[str]) -> Turn:
    if not isinstance(item, Mapping):
        raise RowError("wrong_type", f"field '{field}' contains {shown(item)}, not a turn with role and content")
    fields = Fields(item, f"{field}.")
    name = fields.get(*ROLE_KEYS)
    if name is None:
        raise RowError("wrong_type", f"field '{field}' contains an item without 'role' or 'from'")
    calls = fields.get("tool_calls", "function_call")
    content = fields.get(*CONTENT_KEYS)
    if content is None and any(item.get(key) is not None for key in CONTENT_KEYS):
        content = ""
    role = "assistant" if name in CALLS else _role(name, roles)
    if role is None:
        known = ", ".join(dict.fromkeys(roles.values()))
        raise RowError(
            "broken_roles", f"field '{field}': role {shown(name)} is none of {known}; map it in data.roles"
        )
    if name in CALLS:
        calls, content = content, None
    if role == "tool" and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    thoughts, content = _split_parts(content)
    turn: Turn = {"role": role, "content": "" if content is None else text_of(content, field)}
    if content is None and calls is None:
        raise RowError(
            "missing_text", f"field '{field}' contains a turn without 'content' or 'value', or with null"
        )
    if calls is not None:
        turn["tool_calls"] = [_read_call(call, field) for call in (calls if isinstance(calls, list) else [calls])]
    if thoughts:
        turn["reasoning_content"] = text_of(thoughts, field)
    if (reasoning := fields.get(*REASONING_KEYS)) is not None:
        turn["reasoning_content"] = text_of(reasoning, field)
    for key in ("tool_call_id", "name") if role == "tool" else ():
        if (label := fields.get(key)) is not None:
            turn[key] = text_of(label, field)
    unread |= set(fields.unread())
    return turn


def _split_parts(content: Any) -> tuple[list[Any], Any]:
    """Return the parts of a content that are reasoning, as parts of text, and the other content."""
    if not isinstance(content, list):
        return [], content
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
    thoughts = [
        next((part[key] for key in (kind, *TEXT_KEYS) if part.get(key) is not None), None)
        for part, kind in zip(content, kinds, strict=True)
        if kind in REASONING_KEYS
    ]
    return thoughts, [part for part, kind in zip(content, kinds, strict=True) if kind not in REASONING_KEYS]


def _role(name: Any, roles: Mapping[str, str]) -> str | None:
    return (roles.get(name) or roles.get(name.lower())) if isinstance(name, str) else None


def _read_call(call: Any, field: str) -> dict[str, Any]:
    """Return a call as {type, function: {name, arguments}}; arguments are an object, as chat templates expect."""
    call = from_json(call)
    function = from_json(call.get("function", call)) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("wrong_type", f"field '{field}' contains the tool call {shown(call)} without a name")
    arguments = function.get("arguments", function.get("parameters", {}))
    read = {"type": "function", "function": {"name": function["name"], "arguments": from_json(arguments)}}
    return {"id": call["id"], **read} if isinstance(call.get("id"), str) else read


def text_of(value: Any, field: str) -> str:
    """Return a text, or the texts of a list of parts, one after the other.

    Raises:
        RowError: the value is something else, or a part is an image or another kind that is not read.
    """
    if isinstance(value, Mapping) and "text" in value:
        value = [value]
    if isinstance(value, list) and all(isinstance(part, Mapping | str) for part in value):
        return "".join(_part_text(part, field) for part in value)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"field '{field}' is {type(value).__name__} {shown(value)}, not a text")
    return storable(value, field)


def _part_text(part: Any, field: str) -> str:
    if isinstance(part, str):
        return storable(part, field)
    kind = part.get("type", "text")
    text = next((part[key] for key in TEXT_KEYS if isinstance(part.get(key), str)), None)
    if kind not in ("text", "input_text", "output_text") or text is None:
        raise RowError(
            "unread_content", f"field '{field}' contains a part of type {shown(kind)}; only text is read"
        )
    return storable(text, field)


def from_json(value: Any) -> Any:
    """Return the list or object that a text contains as JSON; return any other value as it is."""
    if isinstance(value, str) and value[:1] in ("[", "{") and value[-1:] in ("]", "}"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def conversation_from_json(value: Any) -> Any:
    """Return the turns that a text contains as JSON. A text with other JSON is an answer, and stays a text."""
    parsed = from_json(value.strip()) if isinstance(value, str) else value
    if isinstance(parsed, str) and PYTHON_TURNS.match(parsed):
        parsed = _from_python(parsed)
    items = parsed if isinstance(parsed, list) else [parsed]
    is_turns = items and all(
        isinstance(item, Mapping)
        and any(key in item for key in ROLE_KEYS)
        and any(key in item for key in CONTENT_KEYS)
        for item in items
    )
    return parsed if is_turns else value


def _from_python(text: str) -> Any:
    """Return the turns of a text that Python wrote, such as a list in a CSV file of pandas."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        reason = "a conversation as Python writes it, which cannot be read back; export it as JSON"
        raise RowError("wrong_type", f"{shown(text)} is {reason}") from error


def is_transcript(text: str) -> bool:
    """Return whether a text starts with a `Human:` turn, as in Anthropic's HH data."""
    return text.lstrip().startswith("Human:") and HH_ANSWER in text


def parse_transcript(text: str, field: str) -> list[Turn]:
    """Return the turns of a `Human:` and `Assistant:` transcript. An empty last answer is left out.

    Raises:
        RowError: the text does not start with `Human:`.
    """
    parts = HH_TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if parts[0].strip() or len(parts) == 1:
        raise RowError("broken_roles", f"field '{field}' does not start with 'Human:'")
    turns = [
        {"role": HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def transcript(turns: Sequence[Turn], user: str = "User") -> str:
    """Return turns as one text, for messages, comparisons and models without a chat template."""
    names = {"user": user}
    parts = (f"{names.get(turn['role'], turn['role'].capitalize())}: {content_text(turn)}" for turn in turns)
    return "\n\n".join(parts) + HH_ANSWER


def content_text(turn: Turn) -> str:
    """Return all texts of a turn: reasoning, content and tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", [])]
    return "\n".join(filter(None, [turn.get("reasoning_content"), turn["content"], *calls]))


def shown(value: Any) -> str:
    """Return the start of a value for a message. Works for large and deeply nested values."""
    return repr((value if isinstance(value, str) else reprlib.repr(value))[:40])


def storable(text: str, field: str) -> str:
    """Return the text, or raise RowError if it cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            raise RowError("invalid_utf8", f"field '{field}': byte {code - 0xDC00:#x} is not UTF-8") from error
        raise RowError("lone_surrogate", f"field '{field}': lone surrogate U+{code:04X}") from error
    return text
