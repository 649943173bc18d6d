"""From canonical preference pairs to token rows: the one place where text becomes tokens."""

from collections.abc import Iterable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from dpo.batching import TokenRow
from dpo.errors import InputError


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt up to the point where the model starts to answer.

    With a chat template the prompt is one user turn followed by the generation prompt; without one it is the
    text itself behind the tokenizer's own start token. Never empty: an empty text becomes the start (or, for
    want of one, the end) token.

    Raises:
        ValueError: the prompt is empty and the tokenizer has neither token.
    """
    if tokenizer.chat_template:
        ids = tokenizer.encode(_prompt_text(tokenizer, prompt), add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not ids and start is None:
        raise ValueError("an empty prompt needs a tokenizer with a start or an end token")
    return ids or [start]


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def completion_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """Token ids of a completion as they follow `prompt_ids`, with exactly one end token where one exists.

    The ids are those that the text has in context, unless a token would reach across the seam; then the
    completion is tokenised by itself, because at inference the prompt's tokens are already fixed.
    """
    before, end = prompt, tokenizer.eos_token
    if tokenizer.chat_template:
        before = _prompt_text(tokenizer, prompt)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
        if whole.startswith(before):
            completion = whole[len(before) :]
    if end:
        completion = completion.rstrip()
        while completion.endswith(end):
            completion = completion.removesuffix(end).rstrip()
    head = tokenizer.encode(before, add_special_tokens=False)
    whole_ids = tokenizer.encode(before + completion, add_special_tokens=False)
    fits = whole_ids[: len(head)] == head
    ids = whole_ids[len(head) :] if fits else _encode_apart(tokenizer, completion)
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _encode_apart(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that starts in the middle of a line: some tokenizers put a space before a first word."""
    before = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    return ids[len(before) :] if ids[: len(before)] == before else tokenizer.encode(text, add_special_tokens=False)


def encode_pairs(
    pairs: Iterable[Mapping[Any, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[TokenRow]:
    """Token rows (chosen first, rejected second) of pairs with `id`, `prompt`, `chosen` and `rejected`.

    A prompt too long for `max_length` tokens together with its longer completion loses tokens on its left; a
    completion is never cut.

    Raises:
        InputError: a completion leaves no room for a prompt token; names the pair, the field and the mend.
    """
    rows = []
    for pair in tqdm(pairs, desc="tokens", unit="pair", mininterval=2):
        prompt = prompt_ids(tokenizer, pair["prompt"])
        completions = []
        for field in ("chosen", "rejected"):
            ids = completion_ids(tokenizer, pair["prompt"], pair[field])
            if len(ids) >= max_length:
                raise InputError(
                    f"pair {pair['id']}: field '{field}' has {len(ids)} tokens; with max_length {max_length} no "
                    "prompt token fits before it. Raise engine.max_length or drop the pair."
                )
            completions.append(tuple(ids))
        room = max_length - max(map(len, completions))
        rows.append(TokenRow(pair["id"], tuple(prompt[-room:]), tuple(completions)))
    return rows
