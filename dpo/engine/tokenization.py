"""Tokenization of prompts and preference pairs. All text of the pipeline becomes tokens here."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpo.common.errors import InputError
from dpo.engine.chat import (
    Conversation,
    Prompt,
    Rendered,
    completion_fields,
    prompt_of,
    render_pairs,
    render_prompts,
    turn_end,
    turns_of,
    with_turns,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = Sequence[int] | NDArray[np.int32]
MIN_TAIL = 16  # tokens of a shortened prompt besides what the chat template writes first


@dataclass(frozen=True)
class TokenRow:
    """One prompt with its completions as token ids. A completion includes its end token.

    Token ids are tuples, or int32 views of a file (`dpo.engine.token_table`).
    """

    id: str
    prompt: Tokens
    completions: tuple[Tokens, ...]
    context: tuple[Tokens, ...] = ()
    """Places in each completion of tokens that are not scored: the turns of others between those of the assistant.
    Empty if all tokens are scored."""
    desirable: bool | None = None
    """Label of a labelled row, None for other rows. A labelled row has two completions: its own, and one that
    answers another prompt, for the KL term of KTO."""

    @property
    def tokens(self) -> int:
        """Number of stream positions."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of scored tokens of each completion."""
        return tuple(
            len(ids) - len(places) for ids, places in zip_longest(self.completions, self.context, fillvalue=())
        )

    @property
    def completion_tokens(self) -> int:
        """Number of tokens whose log-probs are scored."""
        return sum(self.lengths)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the id, the tokens and the label."""
        parts: list[Any] = [self.id, self.prompt, self.completions, *([self.context] if self.context else [])]
        parts += [] if self.desirable is None else [self.desirable]
        return hashlib.sha256(json.dumps(parts, default=np.ndarray.tolist).encode()).digest()

    def to_json(self) -> dict[str, Any]:
        """Return the fields with token ids as lists."""
        return dict(json.loads(json.dumps(vars(self), default=np.ndarray.tolist)))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], longest: int | None = None
) -> list[list[int]]:
    """Return the token ids of prompts, up to the first token of the response.

    With a chat template, a prompt is its turns and the generation prompt. Without one, it is the start token (if
    the tokenizer has one) and the text. An empty text becomes the start token, or else the end token. Prompts are
    shortened to `longest` tokens as `shortened` says.

    Raises:
        InputError: the chat template fails.
        ValueError: a prompt is empty and the tokenizer has neither token.
    """
    rows = _prompt_ids(tokenizer, render_prompts(tokenizer, prompts))
    if longest is None:
        return rows
    return [shortened(tokenizer, prompt, ids, longest) for prompt, ids in zip(prompts, rows, strict=True)]


def shortened(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: Sequence[int], longest: int) -> list[int]:
    """Return the ids of a prompt in at most `longest` tokens.

    The oldest turns are dropped first, from one user turn to the next. What the chat template writes first, such
    as the start token and the system turn, stays. If the last turn alone is too long, its start is cut.
    """
    if len(ids) <= longest:
        return list(ids)
    turns = turns_of(prompt)
    first = next((place for place, turn in enumerate(turns) if turn["role"] != "system"), 0)
    starts = [place for place, turn in enumerate(turns) if place > first and turn["role"] == "user"]
    if tokenizer.chat_template and starts:

        def newer(start: int) -> tuple[Conversation, list[int]]:
            rest = with_turns(prompt, [*turns[:first], *turns[start:]])
            return rest, _prompt_ids(tokenizer, render_prompts(tokenizer, [rest]))[0]

        fits = bisect.bisect_left(starts, True, key=lambda start: len(newer(start)[1]) <= longest)
        return shortened(tokenizer, *newer(starts[min(fits, len(starts) - 1)]), longest)
    head: Sequence[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if tokenizer.chat_template:
        other = with_turns(prompt, [*turns[:-1], {**turns[-1], "content": ""}])
        (empty,) = _prompt_ids(tokenizer, render_prompts(tokenizer, [other]))
        head = commonprefix([list(ids), empty])  # noqa: RUF071
    kept = len(head) if list(ids[: len(head)]) == list(head) and len(head) + MIN_TAIL <= longest else 0
    return [*ids[:kept], *ids[len(ids) - (longest - kept) :]]


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


def token_rows(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Mapping[Any, Any]], rendered: Sequence[Rendered]
) -> list[TokenRow]:
    """Return the token rows of rendered pairs, with the chosen completion first and without truncation.

    A completion ends with exactly one end token if the tokenizer has one. Prompt and completion are tokenized
    together, unless a token would span both. Then the completion is tokenized separately, because at inference the
    tokens of the prompt are fixed. In a completion of several turns, the turns of others are context.
    """
    texts = [each.prompt for each in rendered]
    prompts = _prompt_ids(tokenizer, texts)
    count = len(rendered[0].completions) if rendered else 0
    sides = [
        _completion_ids(tokenizer, texts, [each.completions[side] for each in rendered]) for side in range(count)
    ]
    rows = []
    for pair, prompt, *completions in zip(pairs, prompts, *sides, strict=True):
        context = tuple(places for _, places in completions)
        ids = tuple(ids for ids, _ in completions)
        rows.append(TokenRow(pair["id"], tuple(prompt), ids, context if any(context) else ()))
    return rows


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], completions: Sequence[tuple[str, ...]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the token ids of each completion, and the places of those that are context."""
    # No token spans a special token, so only the text after the last special token of a prompt is tokenized again.
    special = _special_tokens(tokenizer)
    tails = [text[_last_match(special, text) :] for text in texts]
    distinct = sorted(set(tails))
    heads = dict(zip(distinct, _encode(tokenizer, distinct), strict=True))
    both = _encode(tokenizer, [tail + parts[0] for tail, parts in zip(tails, completions, strict=True)])
    end = _end_ids(tokenizer)
    rows = []
    for tail, ids, (first, *more) in zip(tails, both, completions, strict=True):
        cut = len(heads[tail])
        own = ids[cut:] if ids[:cut] == heads[tail] else encode_continuation(tokenizer, first)
        context: list[int] = []
        for number, part in enumerate(_encode(tokenizer, more) if more else []):
            context += range(len(own), len(own) + len(part)) if number % 2 == 0 else ()
            own = own + part
        rows.append((tuple(own + end), tuple(context)))
    return rows


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = turn_end(tokenizer)
    return [tokenizer.convert_tokens_to_ids(end)] if end else []


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


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text that continues a line. Some tokenizers add a space to a first word."""
    prefix = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + text, add_special_tokens=False)
    return ids[len(prefix) :] if ids[: len(prefix)] == prefix else tokenizer.encode(text, add_special_tokens=False)


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
    """Return token rows of canonical pairs, with the chosen completion first, or of demonstrations.

    Prompts are shortened so that a prompt and its longer completion have at most `max_length` tokens. Completions
    are never shortened.

    Raises:
        InputError: a completion leaves no room for a prompt token.
    """
    rows = []
    for pair, row in zip(pairs, token_rows(tokenizer, pairs, render_pairs(tokenizer, pairs)), strict=True):
        for field, ids in zip(completion_fields(pair), row.completions, strict=True):
            if len(ids) >= max_length:
                raise InputError(
                    f"pair {row.id}: field '{field}' has {len(ids)} tokens; with max_length {max_length} no "
                    "prompt token fits. Raise engine.max_length or drop the pair."
                )
        room = max_length - max(map(len, row.completions))
        prompt = shortened(tokenizer, prompt_of(pair, tokenizer), list(row.prompt), room)
        rows.append(dataclasses.replace(row, prompt=tuple(prompt)))
    return rows


def labelled_rows(rows: Iterable[tuple[TokenRow, bool]], max_length: int, origin: str) -> Iterator[TokenRow]:
    """Yield rows of one completion with their label and a second completion, which answers another prompt.

    It is the last completion of the nearest earlier run of rows with one prompt. The first run has that of the row
    after it. As in TRL, it is cut to the `max_length` of prompt and completion.

    Raises:
        InputError: all rows of `origin` have the same prompt.
    """
    earlier: list[tuple[TokenRow, bool]] = []
    number = -1
    for number, (_, group) in enumerate(groupby(rows, key=lambda each: tuple(each[0].prompt))):
        run = list(group)
        if number == 1:
            yield from (_with_other(row, run[0][0], label, max_length) for row, label in earlier)
        if number:
            yield from (_with_other(row, earlier[-1][0], label, max_length) for row, label in run)
        earlier = run
    if number == 0:
        raise InputError(
            f"{origin}: all rows have the same prompt, but the KL term of KTO needs completions of other prompts; "
            "add rows of another prompt"
        )


def _with_other(row: TokenRow, other: TokenRow, label: bool, max_length: int) -> TokenRow:
    """Return a row with its label and the completion of another row, up to `max_length`."""
    room = max_length - len(row.prompt)
    places = [[place for place in each if place < room] for each in other.context[:1]]
    context = (*(row.context or ((),)), *(map(tuple, places) if places else ((),)))
    completions = (*row.completions, tuple(other.completions[0][:room]))
    return dataclasses.replace(
        row, completions=completions, context=context if any(context) else (), desirable=label
    )
