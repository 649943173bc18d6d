"""Tokenization of preference pairs. All text of the pipeline becomes tokens here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dpo.common.errors import InputError
from dpo.common.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS_AT_ONCE = 1000

Prompt = str | Sequence[Mapping[str, str]]
"""The text of one user turn, or a conversation as {role, content} turns that ends with a user turn."""


@dataclass(frozen=True)
class TokenRow:
    """One prompt with its completions as token ids. A completion includes its end token."""

    id: str
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of stream positions."""
        return len(self.prompt) + self.completion_tokens

    @property
    def completion_tokens(self) -> int:
        """Number of tokens whose log-probs are scored."""
        return sum(map(len, self.completions))

    @property
    def digest(self) -> bytes:
        """SHA-256 of the id and the tokens."""
        return hashlib.sha256(json.dumps([self.id, self.prompt, self.completions]).encode()).digest()


def prompt_of(pair: Mapping[Any, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the `turns` of a canonical pair if it has turns and the tokenizer a chat template, else its text."""
    turns = pair.get("turns")
    return pair["prompt"] if turns is None or not tokenizer.chat_template else list(turns)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], longest: int | None = None
) -> list[list[int]]:
    """Return the token ids of prompts, up to the first token of the response.

    With a chat template, a prompt is its turns and the generation prompt. Without one, it is the start token (if
    the tokenizer has one) and the text. An empty text becomes the start token, or else the end token. Prompts are
    truncated on the left to `longest` tokens.

    Raises:
        InputError: the chat template fails.
        ValueError: a prompt is empty and the tokenizer has neither token.
    """
    rows = _prompt_ids(tokenizer, _prompt_texts(tokenizer, prompts))
    return rows if longest is None else [ids[-longest:] for ids in rows]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    start = tokenizer.bos_token_id
    rows = _encode(tokenizer, texts)
    if start is not None and not tokenizer.chat_template:
        rows = [[start, *ids] for ids in rows]
    if all(rows):
        return rows
    substitute = tokenizer.eos_token_id if start is None else start
    if substitute is None:
        raise ValueError("an empty prompt needs a tokenizer with a start or an end token")
    return [ids or [substitute] for ids in rows]


def pair_ids(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Mapping[Any, Any]]
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return the token ids of the prompt, the chosen and the rejected completion of canonical pairs.

    A completion ends with exactly one end token if the tokenizer has one. Prompt and completion are tokenized
    together, unless a token would span both. Then the completion is tokenized separately, because at inference the
    tokens of the prompt are fixed.

    Raises:
        InputError: the chat template fails.
    """
    prompts = [prompt_of(pair, tokenizer) for pair in pairs]
    texts = _prompt_texts(tokenizer, prompts)
    chosen, rejected = ([pair[field] for pair in pairs] for field in ("chosen", "rejected"))
    completions = [_completion_ids(tokenizer, prompts, texts, part) for part in (chosen, rejected)]
    return list(zip(_prompt_ids(tokenizer, texts), *completions, strict=True))


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], texts: Sequence[str], completions: Sequence[str]
) -> list[list[int]]:
    if tokenizer.chat_template:
        conversations = [
            [*turns_of(prompt), {"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        completions = [
            text[len(prompt) :] if text.startswith(prompt) else completion
            for prompt, text, completion in zip(texts, _render(tokenizer, conversations), completions, strict=True)
        ]
    completions = [without_end(completion, tokenizer.eos_token) for completion in completions]
    # No token spans a special token, so only the text after the last special token of a prompt is tokenized again.
    special = _special_tokens(tokenizer)
    tails = [text[_last_match(special, text) :] for text in texts]
    distinct = sorted(set(tails))
    heads = dict(zip(distinct, _encode(tokenizer, distinct), strict=True))
    both = _encode(tokenizer, [tail + completion for tail, completion in zip(tails, completions, strict=True)])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for tail, ids, completion in zip(tails, both, completions, strict=True):
        cut = len(heads[tail])
        rows.append((ids[cut:] if ids[:cut] == heads[tail] else _encode_continuation(tokenizer, completion)) + end)
    return rows


def turns_of(prompt: Prompt) -> list[Mapping[str, str]]:
    """Return the turns of a prompt. A text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _prompt_texts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[str]:
    if not tokenizer.chat_template:
        return [str(prompt) for prompt in prompts]
    return _render(tokenizer, [turns_of(prompt) for prompt in prompts], add_generation_prompt=True)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[list[Mapping[str, str]]],
    *,
    add_generation_prompt: bool = False,
) -> list[str]:
    if not turns:
        return []
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        fix = "fix the model's chat_template.jinja, or the turns"
        raise InputError(f"the tokenizer's chat template fails: {error}; {fix}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of texts. A common prefix that ends at a special token is tokenized once."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    backend.no_truncation()
    backend.no_padding()
    cut = _last_match(_special_tokens(tokenizer), commonprefix(texts))  # noqa: RUF071
    shared = backend.encode(texts[0][:cut], add_special_tokens=False).ids if cut else []
    rests = backend.encode_batch_fast([text[cut:] for text in texts], add_special_tokens=False)
    return [shared + encoding.ids for encoding in rests]


def _encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text that continues a line. Some tokenizers add a space to a first word."""
    prefix = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    return ids[len(prefix) :] if ids[: len(prefix)] == prefix else tokenizer.encode(text, add_special_tokens=False)


def without_end(completion: str, end: str | None) -> str:
    """Return a completion without trailing end tokens and the whitespace around them."""
    if not end:
        return completion
    while (completion := completion.rstrip()).endswith(end):
        completion = completion.removesuffix(end)
    return completion


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of the special tokens that the tokenizer splits off before any other step."""
    literal = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    ]
    return re.compile("|".join(map(re.escape, sorted(literal, key=len, reverse=True))) or r"(?!)")


def _last_match(pattern: re.Pattern[str], text: str) -> int:
    """Return the start of the last match, or 0."""
    return max((match.start() for match in pattern.finditer(text)), default=0)


def encode_pairs(
    pairs: Sequence[Mapping[Any, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[TokenRow]:
    """Return token rows of canonical pairs, with the chosen completion first.

    Prompts are truncated on the left so that a prompt and its longer completion have at most `max_length` tokens.
    Completions are never truncated.

    Raises:
        InputError: a completion leaves no room for a prompt token.
    """
    rows = []
    with progress(total=len(pairs), desc="tokens", unit="pair", mininterval=2, delay=2) as bar:
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            part = pairs[start : start + PAIRS_AT_ONCE]
            for pair, (prompt, *completions) in zip(part, pair_ids(tokenizer, part), strict=True):
                for field, ids in zip(("chosen", "rejected"), completions, strict=True):
                    if len(ids) >= max_length:
                        raise InputError(
                            f"pair {pair['id']}: field '{field}' has {len(ids)} tokens; with max_length "
                            f"{max_length} no prompt token fits. Raise engine.max_length or drop the pair."
                        )
                room = max_length - max(map(len, completions))
                rows.append(TokenRow(pair["id"], tuple(prompt[-room:]), tuple(map(tuple, completions))))
            bar.update(len(part))
    return rows
