"""Answers drawn from a policy by the transformers generator."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from dpo.common.distributed import share, this_process
from dpo.engine.logprobs import LogProbModel
from dpo.engine.tokenization import Prompt, prompt_ids

ROWS_AT_ONCE = 128
"""Answers generated together: they share each reading of the weights; each needs memory for keys and values."""

STEPS_AT_ONCE = 8
"""Tokens drawn before answers that have ended leave the batch."""


def sample(
    model: LogProbModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    longest_prompt: int | None = None,
) -> list[list[int]]:
    """One answer a prompt, drawn from the whole distribution (no top-k, no top-p).

    Equal prompts are read once; each still gets a draw of its own. A prompt of more tokens than `longest_prompt`
    loses its beginning.

    Returns:
        Token ids of each answer; an answer that ended holds its end token, one that reached `max_new_tokens`
        does not.
    """
    rows = prompt_ids(tokenizer, prompts, longest_prompt)
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), rows[number]))
    end = tokenizer.eos_token_id
    answers: list[list[int]] = [[] for _ in rows]
    torch.manual_seed(seed)
    bar = tqdm(total=len(rows), desc="answers", unit="row", disable=len(rows) == 1)
    with model.generation() as generator, bar:
        generate = functools.partial(
            generator.generate,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=end,
            pad_token_id=0 if end is None else end,
            return_dict_in_generate=True,
        )
        takes_cache = "past_key_values" in inspect.signature(generator.forward).parameters
        for first in range(0, len(rows), ROWS_AT_ONCE):
            batch = order[first : first + ROWS_AT_ONCE]
            ids, mask = (t.to(model.device) for t in _left_padded([rows[number] for number in batch]))
            cache = _shared_cache(generate, ids, mask) if takes_cache else None
            drawn = _continue(generate, ids, mask, cache, max_new_tokens, end)
            for number, answer in zip(batch, drawn, strict=True):
                answers[number] = answer
            bar.update(len(batch))
    return answers


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [R, T] and mask [R, T] of R rows, the longest of T tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _shared_cache(generate: Callable[..., Any], ids: Tensor, mask: Tensor) -> DynamicCache | None:
    """Keys and values of left-padded prompts [R, T] up to their last token, equal prompts computed once.

    None where all prompts are of one token, and for a model with a cache of another kind.
    """
    distinct, owner = torch.unique(torch.stack([ids, mask], 1), dim=0, return_inverse=True)
    before = distinct[:, :, :-1]
    if not before.shape[2]:
        return None
    cache = generate(input_ids=before[:, 0], attention_mask=before[:, 1], max_new_tokens=1).get("past_key_values")
    if type(cache) is not DynamicCache:  # a subclass may hold more than the layers that are reordered
        return None
    cache.reorder_cache(owner)
    return cache


def _continue(
    generate: Callable[..., Any],
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache | None,
    max_new_tokens: int,
    end: int | None,
) -> list[list[int]]:
    """Answers to left-padded prompts [R, T], by `STEPS_AT_ONCE` tokens if there is a cache to go on from."""
    if cache is None:
        steps = max_new_tokens
    else:
        steps, generate = STEPS_AT_ONCE, functools.partial(generate, past_key_values=cache)
    answers: list[list[int]] = [[] for _ in ids]
    going = list(range(len(ids)))
    for made in range(0, max_new_tokens, steps):
        width = ids.shape[1]
        new_tokens = min(steps, max_new_tokens - made)
        ids = generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens).sequences
        for number, row in zip(going, ids[:, width:].tolist(), strict=True):
            answers[number] += row[: row.index(end) + 1] if end in row else row
        rest = [place for place, number in enumerate(going) if answers[number][-1] != end]
        if cache is None or not rest:
            break
        going = [going[place] for place in rest]
        kept = torch.tensor(rest, device=ids.device)
        ids, mask = ids[kept], F.pad(mask[kept], (0, ids.shape[1] - width), value=1)
        cache.reorder_cache(kept)
    return answers


def answer_table(
    model: LogProbModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    max_prompt_tokens: int,
    seed: int,
) -> pd.DataFrame:
    """Sample one response per prompt by `sample`, at temperature 1; the processes of a launch share the prompts.

    Returns:
        One row a prompt: `answer`, its text; `ids`, its tokens; `finished`, whether it ended with the end token.
    """

    def draw(mine: list[int]) -> list[list[int]]:
        return sample(
            model,
            tokenizer,
            [prompts[number] for number in mine],
            max_new_tokens=max_new_tokens,
            temperature=1.0,
            seed=seed + this_process().process_index,
            longest_prompt=max_prompt_tokens,
        )

    answers = share(len(prompts), draw)
    return pd.DataFrame(
        {
            "answer": tokenizer.batch_decode(answers, skip_special_tokens=True),
            "ids": answers,
            "finished": [answer[-1] == tokenizer.eos_token_id for answer in answers],
        }
    )
