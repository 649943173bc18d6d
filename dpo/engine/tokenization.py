"""From canonical preference pairs to token rows: the one place where text becomes tokens."""

import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dpo.common.errors import InputError
from dpo.engine.packing import TokenRow

PAIRS_AT_ONCE = 1000

Prompt = str | Sequence[Mapping[str, str]]
"""One user turn, or the turns of a conversation as {role, content}, the last of them the user's."""


def prompt_of(pair: Mapping[Any, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt of a canonical pair: its `turns` where there are any and a chat template, else its text."""
    turns = pair.get("turns")
    return pair["prompt"] if turns is None or not tokenizer.chat_template else list(turns)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], longest: int | None = None
) -> list[list[int]]:
    """Token ids of prompts up to the point where the model starts to answer.

    With a chat template a prompt is its turns followed by the generation prompt; without one it is the text
    itself behind the tokenizer's own start token. Never empty: an empty text becomes the start (or, for want of
    one, the end) token. A prompt of more than `longest` tokens loses its beginning.

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
    alone = tokenizer.eos_token_id if start is None else start
    if alone is None:
        raise ValueError("an empty prompt needs a tokenizer with a start or an end token")
    return [ids or [alone] for ids in rows]


def pair_ids(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Mapping[Any, Any]]
) -> list[tuple[list[int], list[int], list[int]]]:
    """Token ids of the prompt, the chosen and the rejected completion of canonical pairs.

    A completion ends with exactly one end token where the tokenizer has one. Its ids are those that the text has
    in context, unless a token would reach across the seam; then the completion is tokenised by itself, because at
    inference the prompt's tokens are already fixed.

    Args:
        tokenizer: of the model.
        pairs: with `prompt`, `chosen`, `rejected`, and `turns` where a prompt is a conversation.

    Raises:
        InputError: the chat template fails.
    """
    prompts = [prompt_of(pair, tokenizer) for pair in pairs]
    texts = _prompt_texts(tokenizer, prompts)
    chosen, rejected = (
        _completion_ids(tokenizer, prompts, texts, [pair[field] for pair in pairs])
        for field in ("chosen", "rejected")
    )
    return list(zip(_prompt_ids(tokenizer, texts), chosen, rejected, strict=True))


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], texts: Sequence[str], completions: Sequence[str]
) -> list[list[int]]:
    if tokenizer.chat_template:
        answered = [
            [*turns_of(prompt), {"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        completions = [
            whole[len(before) :] if whole.startswith(before) else completion
            for before, whole, completion in zip(texts, _render(tokenizer, answered), completions, strict=True)
        ]
    completions = [without_end(completion, tokenizer.eos_token) for completion in completions]
    # No token reaches across a special token: what stands before the prompt's last one need not be read again.
    special = _special_tokens(tokenizer)
    tails = [text[_last_start(special, text) :] for text in texts]
    distinct = sorted(set(tails))
    heads = dict(zip(distinct, _encode(tokenizer, distinct), strict=True))
    both = _encode(tokenizer, [tail + completion for tail, completion in zip(tails, completions, strict=True)])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for tail, ids, completion in zip(tails, both, completions, strict=True):
        seam = len(heads[tail])
        rows.append((ids[seam:] if ids[:seam] == heads[tail] else _encode_apart(tokenizer, completion)) + end)
    return rows


def turns_of(prompt: Prompt) -> list[Mapping[str, str]]:
    """The turns of a prompt; a text is one turn of the user's."""
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
        raise InputError(
            f"the tokenizer's chat template fails: {error}; mend the model's chat_template.jinja, or the turns"
        ) from error


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of texts as they are; what all share up to a special token, as a system turn, is read once."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    backend.no_truncation()
    backend.no_padding()
    cut = _last_start(_special_tokens(tokenizer), commonprefix(texts))  # noqa: RUF071
    shared = backend.encode(texts[0][:cut], add_special_tokens=False).ids if cut else []
    rests = backend.encode_batch_fast([text[cut:] for text in texts], add_special_tokens=False)
    return [shared + encoding.ids for encoding in rests]


def _encode_apart(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that starts in the middle of a line: some tokenizers put a space before a first word."""
    before = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    return ids[len(before) :] if ids[: len(before)] == before else tokenizer.encode(text, add_special_tokens=False)


def without_end(completion: str, end: str | None) -> str:
    """A completion without the end tokens, and the space around them, that it may end with."""
    if not end:
        return completion
    completion = completion.rstrip()
    while completion.endswith(end):
        completion = completion.removesuffix(end).rstrip()
    return completion


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the tokens that are cut out of a text before anything else is done to it."""
    literal = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    ]
    return re.compile("|".join(map(re.escape, sorted(literal, key=len, reverse=True))) or r"(?!)")


def _last_start(special: re.Pattern[str], text: str) -> int:
    start = 0
    for match in special.finditer(text):
        start = match.start()
    return start


def encode_pairs(
    pairs: Sequence[Mapping[Any, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[TokenRow]:
    """Token rows (chosen first, rejected second) of canonical pairs.

    A prompt too long for `max_length` tokens together with its longer completion loses tokens on its left; a
    completion is never cut.

    Raises:
        InputError: a completion leaves no room for a prompt token; names the pair, the field and the mend.
    """
    rows = []
    with tqdm(total=len(pairs), desc="tokens", unit="pair", mininterval=2, delay=2) as bar:
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
