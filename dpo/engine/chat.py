"""Conversations as text: rendering with a model's chat template, and the tokens that end a turn.

All text that a model reads or learns is rendered here. Without a chat template, a prompt is its plain text.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dpo.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, Any]
Prompt = str | Sequence[Turn]
"""The text of one user turn, or a conversation that ends before the assistant's turn (`Conversation`)."""
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class Conversation(list[Turn]):
    """Turns with `role` and `content`, the tools that the assistant may call, and template variables."""

    def __init__(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(turns)
        self.tools, self.variables = tools, variables or {}


@dataclass(frozen=True)
class Rendered:
    """A pair as text.

    Attributes:
        prompt: up to the first token of the response.
        completions: parts of each completion, in turn the assistant's own text and the text of others after it.
            One part if the completion is one turn.
    """

    prompt: str
    completions: tuple[tuple[str, ...], ...]


def prompt_of(pair: Mapping[Any, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the prompt of a canonical pair. A tokenizer without a chat template uses only its text."""
    turns, tools, variables = pair.get("turns"), _read(pair, "tools"), _read(pair, "chat_template_kwargs")
    if not tokenizer.chat_template or (turns is None and tools is None and variables is None):
        return str(pair["prompt"])
    asked = [{"role": "user", "content": pair["prompt"]}] if turns is None else read_turns(turns)
    return Conversation(asked, tools, variables)


def _read(pair: Mapping[Any, Any], column: str) -> Any:
    """Return a JSON column of a row of a canonical table, in which pandas writes NaN for none."""
    value = pair.get(column)
    return json.loads(value) if isinstance(value, str) else None


def read_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Return turns of a canonical table, which has all keys in every turn and tool calls as JSON."""
    given = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    return [
        {**turn, **({"tool_calls": json.loads(turn["tool_calls"])} if "tool_calls" in turn else {})}
        for turn in given
    ]


def turns_of(prompt: Prompt) -> list[Turn]:
    """Return the turns of a prompt. A text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def render_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[str]:
    """Return the texts of prompts, up to the first token of the response.

    Raises:
        InputError: the chat template fails.
    """
    if not tokenizer.chat_template:
        return [str(prompt) for prompt in prompts]
    return _render(tokenizer, [_conversation(prompt) for prompt in prompts], add_generation_prompt=True)


def render_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Mapping[Any, Any]]) -> list[Rendered]:
    """Return canonical pairs, demonstrations or labelled rows as text, without the end token of the last turn.

    All have the same number of completions.

    Raises:
        InputError: the chat template fails.
    """
    prompts = [prompt_of(pair, tokenizer) for pair in pairs]
    texts = render_prompts(tokenizer, prompts)
    sides = [
        _completions(tokenizer, prompts, texts, pairs, fields)
        for fields in zip(*map(completion_fields, pairs), strict=True)
    ]
    return [Rendered(text, tuple(completions)) for text, *completions in zip(texts, *sides, strict=True)]


def completion_fields(row: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the fields of a row's completions.

    A demonstration has `chosen` only. A labelled row has `chosen` if its completion is desirable, else `rejected`.
    """
    return tuple(field for field in ("chosen", "rejected") if isinstance(row.get(field), str))


def _completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    pairs: Sequence[Mapping[Any, Any]],
    fields: Sequence[str],
) -> list[tuple[str, ...]]:
    """Return the parts of one completion of each pair, which is in its field of `fields`."""
    ends = end_tokens(tokenizer)
    if not tokenizer.chat_template:
        return [(without_end(pair[field], ends),) for pair, field in zip(pairs, fields, strict=True)]
    tails = [completion_turns(pair, field) for pair, field in zip(pairs, fields, strict=True)]
    conversations = [
        with_turns(prompt, [*turns_of(prompt), tail[0]]) for prompt, tail in zip(prompts, tails, strict=True)
    ]
    firsts = [
        without_end(_own_text(text, tail[0], closed), ends)
        for text, tail, closed in zip(texts, tails, _render(tokenizer, conversations), strict=True)
    ]
    return [
        (first,) if len(tail) == 1 else _parts(tokenizer, prompt, text + first, tail, len(text))
        for first, tail, prompt, text in zip(firsts, tails, prompts, texts, strict=True)
    ]


def completion_turns(pair: Mapping[Any, Any], field: str) -> list[Turn]:
    """Return the turns of the completion `field` of a canonical pair."""
    turns = pair.get(f"{field}_turns")
    return [{"role": "assistant", "content": pair[field]}] if turns is None else read_turns(turns)


def _parts(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, written: str, tail: Sequence[Turn], start: int
) -> tuple[str, ...]:
    """Return what the model writes in each of its turns, and what others write after all but the last.

    `written` is the prompt, which ends at `start`, with the first of these turns.
    """
    ends, end = end_tokens(tokenizer), turn_end(tokenizer)
    parts = [written[start:]]
    for place in [place for place, turn in enumerate(tail) if place and turn["role"] == "assistant"]:
        parts[-1] += end
        written += end
        before = with_turns(prompt, [*turns_of(prompt), *tail[:place]])
        (opening,) = _render(tokenizer, [before], add_generation_prompt=True)
        if not opening.startswith(written):
            raise InputError(
                f"the tokenizer's chat template changes an earlier turn: {_shown(written, opening)!r}"
            )
        (closed,) = _render(tokenizer, [with_turns(before, [*before, tail[place]])])
        own = without_end(_own_text(opening, tail[place], closed), ends)
        parts += [opening[len(written) :], own]
        written = opening + own
    return tuple(parts)


def _shown(text: str, other: str) -> str:
    """Return the part of a text around the first character that differs from another text."""
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))
    return text[max(0, place - 20) : place + 20]


def with_turns(prompt: Prompt, turns: Sequence[Turn]) -> Conversation:
    """Return other turns with the tools and the template variables of a prompt."""
    return Conversation(turns, *((prompt.tools, prompt.variables) if isinstance(prompt, Conversation) else ()))


def _own_text(opening: str, turn: Turn, closed: str) -> str:
    """Return the text of an assistant's turn after `opening`, in which the template may have begun the turn.

    A template may remove reasoning from the turn that it closes. Then the turn's own text is used, without its
    start if that is the end of `opening`, such as `<think>`.
    """
    if closed.startswith(opening):
        return closed[len(opening) :]
    text: str = turn["content"]
    if reasoning := turn.get("reasoning_content"):
        text = f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{text}"
    shared = next((n for n in range(len(THINK_OPEN) + 2, 0, -1) if opening.endswith(text[:n])), 0)
    if not shared and opening.rstrip().endswith(THINK_OPEN) and text.lstrip().startswith(THINK_OPEN):
        return text.lstrip().removeprefix(THINK_OPEN).lstrip("\n")
    return text[shared:] if THINK_OPEN in text[:shared] else text


def without_end(text: str, ends: Collection[str]) -> str:
    """Return a text without trailing white space and end tokens. Without end tokens it stays as it is."""
    while ends:
        text = text.rstrip()
        end = next((end for end in ends if text.endswith(end)), None)
        if end is None:
            break
        text = text.removesuffix(end)
    return text


@functools.cache
def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the special token that ends a response: the one that the chat template writes, else the end token.

    Empty if there is neither.
    """
    end = tokenizer.eos_token or ""
    if not tokenizer.chat_template:
        return end
    mark = "response"
    turns = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": mark}]
    try:
        (text,) = _render(tokenizer, [Conversation(turns)])
    except InputError:
        return end
    rest = text.rpartition(mark)[2].lstrip()
    special = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return next((token for token in special if rest.startswith(token)), end)


@functools.cache
def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the special tokens that may end a response. The first one is trained."""
    return tuple(dict.fromkeys(filter(None, (turn_end(tokenizer), tokenizer.eos_token))))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the special tokens of a tokenizer, which a text must not contain."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _conversation(prompt: Prompt) -> Conversation:
    return prompt if isinstance(prompt, Conversation) else Conversation(turns_of(prompt))


def _render(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Conversation], *, add_generation_prompt: bool = False
) -> list[str]:
    """Return conversations as text. Those without tools and variables are rendered together."""
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        if any(chat.tools or chat.variables for chat in chats):
            return [
                tokenizer.apply_chat_template(
                    list(chat),
                    tools=chat.tools,
                    chat_template=template_of(tokenizer, chat.tools),
                    **options,
                    **chat.variables,
                )
                for chat in chats
            ]
        options["chat_template"] = template_of(tokenizer)
        return tokenizer.apply_chat_template([list(chat) for chat in chats], **options) if chats else []
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        fix = "fix the model's chat_template.jinja, or the turns"
        if any(turn["role"] == "system" for chat in chats for turn in chat):
            fix += "; model.system_in_user_turn moves a system text into the first user turn"
        raise InputError(f"the tokenizer's chat template fails: {error}; {fix}") from error


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None = None) -> str:
    """Return the chat template of a conversation. Of several named templates, `tool_use` is used with tools.

    Raises:
        InputError: there are several templates, and none is `default`.
    """
    given = tokenizer.chat_template
    if not isinstance(given, Mapping):
        return str(given)
    name = "tool_use" if tools and "tool_use" in given else "default"
    if name not in given:
        found = ", ".join(sorted(given))
        raise InputError(f"the tokenizer has the chat templates {found}, and none is `default`; rename one")
    return str(given[name])


def fix_template(
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, bool | float | str],
    day: str | None,
    *,
    system_in_user_turn: bool = False,
) -> None:
    """Make a tokenizer's chat template independent of the caller and of the clock, in place.

    `variables` are set at the start of the template, unless a row sets them. Calls of `strftime_now` become the
    date `day`. With `system_in_user_turn`, the template reads a system turn as the start of the next user turn.

    Raises:
        InputError: the template writes a date and `day` is None, or the format of the date is not a literal.
    """
    given = tokenizer.chat_template
    if not given:
        return
    first = "".join(SET_DEFAULT.format(name=name, value=_literal(value)) for name, value in variables.items())
    if system_in_user_turn:
        first += MERGE_SYSTEM
    if isinstance(given, dict):
        tokenizer.chat_template = {name: first + _fixed_date(text, day) for name, text in given.items()}
    else:
        tokenizer.chat_template = first + _fixed_date(given, day)


SET_DEFAULT = "{{%- if {name} is not defined -%}}{{%- set {name} = {value} -%}}{{%- endif -%}}\n"
MERGE_SYSTEM = (
    "{%- if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' -%}\n"
    "{%- set merged = messages[0]['content'] + '\\n\\n' + messages[1]['content'] -%}\n"
    "{%- set messages = [{'role': 'user', 'content': merged}] + messages[2:] -%}\n"
    "{%- endif -%}\n"
)


def _literal(value: bool | float | str) -> str:
    """Return a value as a Jinja expression."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _fixed_date(template: str, day: str | None) -> str:
    if "strftime_now(" not in template:
        return template
    if day is None:
        raise InputError("the chat template writes today's date; set model.date to a day such as 2026-11-26")
    date = datetime.date.fromisoformat(day)
    call = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
    fixed = call.sub(lambda found: repr(date.strftime(found[2])), template)
    if "strftime_now(" in fixed:
        raise InputError("the chat template formats today's date in a way that cannot be fixed; edit the template")
    return fixed


def unknown_variables(tokenizer: PreTrainedTokenizerBase, pair: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Return the rule that template variables of a canonical pair break if the chat template does not read them.

    Values that are empty, such as a list of no tools, have no effect and break no rule.
    """
    if not (given := _read(pair, "chat_template_kwargs")):
        return []
    template = template_of(tokenizer, _read(pair, "tools")) if tokenizer.chat_template else ""
    unknown = [
        name
        for name, value in given.items()
        if value not in ("", [], {}) and not re.search(rf"\b{re.escape(name)}\b", template)
    ]
    reason = "the chat template does not read the variable {!r} of field 'chat_template_kwargs'"
    return [("template_refuses", reason.format(name)) for name in unknown[:1]]


def changed_texts(pair: Mapping[Any, Any], rendered: Rendered) -> list[tuple[str, str]]:
    """Return the rules that the rendering of a canonical pair breaks, each with the reason.

    Every text of the prompt and of both completions must be in the rendered text, and reasoning must be closed.
    """
    turns, tools, prompt = pair.get("turns"), _read(pair, "tools") or [], rendered.prompt
    asked = [{"content": pair["prompt"]}] if turns is None else read_turns(turns)
    names = [tool.get("function", {}).get("name", "") for tool in tools]
    broken = [
        ("tools_unsupported", f"the chat template does not write the tool {name!r}")
        for name in names
        if name not in prompt
    ][:1]
    if missing := next(filter(None, (_missing(turn, prompt) for turn in asked)), None):
        broken.append(("prompt_changed", f"the chat template drops or changes {missing[:40]!r} of the prompt"))
    for field, parts in zip(completion_fields(pair), rendered.completions, strict=True):
        text = "".join(parts)
        tail = completion_turns(pair, field)
        if missing := next(filter(None, (_missing(turn, text) for turn in tail)), None):
            rule = "tools_unsupported" if any("tool_calls" in turn for turn in tail) else "answer_changed"
            broken.append((rule, f"the chat template drops or changes {missing[:40]!r} of field '{field}'"))
        if prompt.rstrip().endswith(THINK_OPEN) and THINK_CLOSE not in text:
            reason = f"the chat template opens {THINK_OPEN} and field '{field}' does not close it"
            broken.append(("answer_changed", f"{reason}; add the reasoning, or set model.template_kwargs"))
    return broken


def _missing(turn: Turn, text: str) -> str | None:
    """Return a text of the turn that the rendered text does not contain, or None."""
    parts = re.split(f"{THINK_OPEN}|{THINK_CLOSE}", turn["content"])
    parts += [
        turn.get("reasoning_content", ""),
        *(call["function"]["name"] for call in turn.get("tool_calls", [])),
    ]
    return next((part.strip() for part in parts if part.strip() not in text), None)
