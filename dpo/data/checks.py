"""Checks of single rows: the rules about a pair's texts and its length in tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ftfy
import ftfy.badness

from dpo.common.errors import InputError
from dpo.data.formats import COMPLETIONS, Pair, normalize
from dpo.engine import chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x9f\ufffe\uffff]")
"""Characters that no text contains. Form feeds, bidirectional marks and marks of the byte order are text."""
TEMPLATES = {
    "ChatML": (r"<\|im_start\|>(system|user|assistant|developer)\b", r"<\|im_start\|>assistant"),
    "the template of Llama 3": (r"<\|start_header_id\|>", r"<\|end_header_id\|>"),
    "the template of Llama 2 or Mistral": (r"(<s>)?\s*\[INST\]", r"\[/INST\]"),
    "the template of Gemma": (r"<start_of_turn>(user|model)", r"<start_of_turn>model"),
    "the template of Zephyr or Phi": (r"<\|(system|user)\|>", r"<\|assistant\|>"),
    "the template of DeepSeek": ("<｜(begin▁of▁sentence|User)｜>", "<｜Assistant｜>"),
    "the template of Alpaca": (r"### (Instruction|Input):", r"### (Response|Output):"),
}
"""Chat templates by name: what a rendered prompt starts with, and what it ends with."""
RENDERED = re.compile(
    "|".join(f"(?P<t{n}>^\\s*{start}|{end}\\s*$)" for n, (start, end) in enumerate(TEMPLATES.values()))
)
THOUGHT = re.compile(rf"\A\s*(?:{chat.THINK_OPEN})?(.*?){chat.THINK_CLOSE}", re.DOTALL)
"""The thought at the start of a completion, whose tags are special tokens of some tokenizers."""
ROLE_MARK = re.compile(r"\s*(assistant|answer|response|bot|ai|gpt)\s*:", re.IGNORECASE)
"""A role mark at the start of a completion."""
PROMPT_MARK = re.compile(
    r"^\s*(human|user)\s*:|(^|\s)(assistant|answer|response|bot|ai|gpt)\s*:\s*$", re.IGNORECASE
)
"""A role mark at the start or at the end of a prompt."""


class Violation(NamedTuple):
    """A row that breaks a rule."""

    row: int
    """Position in the raw table, from 0."""
    rule: str
    reason: str


def check_texts(pair: Mapping[str, Any], special: re.Pattern[str], ends: Sequence[str]) -> list[tuple[str, str]]:
    """Return the rules that a pair's texts break, each with the reason.

    `special` is from `special_tokens`. The tokens `ends` are allowed at the end of a completion.
    """
    completions = chat.completion_fields(pair)
    empty = [field for field in completions if not pair[field].strip()]
    broken = [("empty_completion", f"field '{field}' contains no text") for field in empty]
    if len(completions) > 1 and not broken and normalize(pair["chosen"]) == normalize(pair["rejected"]):
        broken.append(("identical_completions", "chosen and rejected differ at most in case and space"))
    if found := RENDERED.search(pair["prompt"]):
        name = next(name for n, name in enumerate(TEMPLATES) if found[f"t{n}"])
        broken.append(("rendered_text", f"field 'prompt' is rendered with {name}: pass turns instead"))
    for field in ("prompt", *completions):
        text = pair[field]
        if found := CONTROL.search(text):
            code = f"U+{ord(found[0]):04X}"
            broken.append(("control_characters", f"field '{field}', character {found.start()}: {code}"))
        if excerpt := _mojibake(text):
            broken.append(("mojibake", f"field '{field}' looks wrongly decoded: {excerpt!r}"))
        if field != "prompt":
            text = THOUGHT.sub(r"\1", chat.without_end(text, ends), count=1)
        if found := special.search(text):
            broken.append(("special_tokens", f"field '{field}', character {found.start()}: {found[0]}"))
    return broken


def _mojibake(text: str) -> str | None:
    """Return the first part of a text that was decoded with the wrong encoding, or None.

    A sequence that is only unlikely, such as `ä”`, is no fault: a text is broken if it has replacement characters,
    or if decoding it again gives another text.
    """
    found = None if text.isascii() else ftfy.badness.BADNESS_RE.search(text)
    if found is None or ("\ufffd" not in text and ftfy.fix_encoding(text) == text):
        return None
    return text[max(0, found.start() - 10) : found.start() + 20]


def has_role_mark(pair: Mapping[str, Any]) -> bool:
    """Return whether the prompt of a pair starts or ends with a role mark, or both completions start with one."""
    is_marked = pair["turns"] is None and PROMPT_MARK.search(pair["prompt"]) is not None
    return is_marked or all(ROLE_MARK.match(pair[field]) for field in chat.completion_fields(pair))


def special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str]:
    """Return a pattern that matches a tokenizer's special tokens, or nothing if there is no tokenizer.

    In a text they would be encoded as control tokens. Reasoning tags are no fault if the chat template reads them.
    """
    if tokenizer is None:
        return re.compile(r"(?!)")
    tags = {tag for tag in (chat.THINK_OPEN, chat.THINK_CLOSE) if tag in str(tokenizer.chat_template)}
    names = chat.special_tokens(tokenizer) - tags
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def render(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]
) -> tuple[list[chat.Rendered | None], list[list[tuple[str, str]]]]:
    """Return pairs as text, None if the chat template refuses one, and the rules that each rendering breaks."""
    try:
        rendered: list[chat.Rendered | None] = list(chat.render_pairs(tokenizer, pairs))
    except InputError as error:
        if len(pairs) == 1:
            return [None], [[("template_refuses", str(error))]]
        parts = [render(tokenizer, [pair]) for pair in pairs]
        return [text for texts, _ in parts for text in texts], [rules for _, each in parts for rules in each]
    return rendered, [
        chat.unknown_variables(tokenizer, pair) + chat.changed_texts(pair, text)
        for pair, text in zip(pairs, rendered, strict=True)
        if text
    ]


def check_lengths(
    tokens: Sequence[int], max_length: int, turns: Sequence[Mapping[str, Any]] | None = None
) -> list[tuple[str, str]]:
    """Return the rules about `max_length` that a pair's numbers of tokens break, each with the reason.

    `turns` are those of the prompt, if they are more than one user turn.
    """
    prompt, chosen, rejected = tokens  # 0 for none
    longer = max(chosen, rejected)
    excess = prompt + longer - max_length
    if longer >= max_length:
        field = COMPLETIONS[rejected > chosen]
        return [("completion_too_long", f"field '{field}' has {longer} tokens, max_length is {max_length}")]
    if excess > 0:
        is_one = sum(turn["role"] == "user" for turn in turns or ()) < 2
        lost = "the start of the prompt is cut" if is_one else "the oldest turns are dropped"
        return [
            ("prompt_truncated", f"{excess} of {prompt} prompt tokens do not fit max_length {max_length}; {lost}")
        ]
    return []
