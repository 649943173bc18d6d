"""Sampling of responses with the transformers generator."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase

from dpo.common.distributed import share, this_process
from dpo.common.progress import progress
from dpo.engine.logprobs import LogProbModel
from dpo.engine.tokenization import Prompt, prompt_ids

BATCH_SIZE = 128  # responses generated together; each one needs memory for its keys and values
TOKENS_PER_ROUND = 8  # sampled before finished responses leave the batch
Generate = Callable[..., Any]


def sample(
    model: LogProbModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    max_prompt_tokens: int | None = None,
) -> list[list[int]]:
    """Sample one response per prompt from the full distribution (no top-k, no top-p).

    Equal prompts share one forward pass and get independent responses. Prompts of more than `max_prompt_tokens`
    tokens are truncated at the left.

    Returns:
        Token ids of each response. A finished response ends with the end token; one that was truncated at
        `max_new_tokens` does not.
    """
    rows = prompt_ids(tokenizer, prompts, max_prompt_tokens)
    order = sorted(range(len(rows)), key=lambda number: (len(rows[number]), rows[number]))
    end = tokenizer.eos_token_id
    responses: dict[int, list[int]] = {}
    left_pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    torch.manual_seed(seed)
    bar = progress(total=len(rows), desc="responses", unit="response", disable=len(rows) == 1)
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
        for first in range(0, len(rows), BATCH_SIZE):
            batch = order[first : first + BATCH_SIZE]
            prompt_tokens = [torch.LongTensor(rows[number]).to(model.device) for number in batch]
            ids, mask = left_pad(prompt_tokens), left_pad([torch.ones_like(row) for row in prompt_tokens])
            cache = _shared_cache(generate, ids, mask) if takes_cache else None
            responses |= zip(batch, _continue(generate, ids, mask, cache, max_new_tokens, end), strict=True)
            bar.update(len(batch))
    return [responses[number] for number in range(len(rows))]


def _shared_cache(generate: Generate, ids: Tensor, mask: Tensor) -> DynamicCache | None:
    """Return keys and values of left-padded prompts [R, T] without their last token. Equal prompts share a pass.

    Return None if all prompts have one token, or if the model uses another kind of cache.
    """
    distinct, index = torch.unique(torch.stack([ids, mask], 1), dim=0, return_inverse=True)
    before = distinct[:, :, :-1]
    if not before.shape[2]:
        return None
    cache = generate(input_ids=before[:, 0], attention_mask=before[:, 1], max_new_tokens=1).get("past_key_values")
    if type(cache) is not DynamicCache:  # a subclass may have state that is not reordered
        return None
    cache.reorder_cache(index)
    return cache


def _continue(
    generate: Generate, ids: Tensor, mask: Tensor, cache: DynamicCache | None, max_new_tokens: int, end: int | None
) -> list[list[int]]:
    """Return responses to left-padded prompts [R, T], sampled in rounds if there is a cache to continue from."""
    if cache is None:
        steps = max_new_tokens
    else:
        steps, generate = TOKENS_PER_ROUND, functools.partial(generate, past_key_values=cache)
    responses: list[list[int]] = [[] for _ in ids]
    active = list(range(len(ids)))
    for done in range(0, max_new_tokens, steps):
        width = ids.shape[1]
        new_tokens = min(steps, max_new_tokens - done)
        ids = generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens).sequences
        for number, row in zip(active, ids[:, width:].tolist(), strict=True):
            responses[number] += row[: row.index(end) + 1] if end in row else row
        unfinished = [i for i, number in enumerate(active) if responses[number][-1] != end]
        if cache is None or not unfinished:
            break
        active = [active[i] for i in unfinished]
        kept = torch.tensor(unfinished, device=ids.device)
        ids, mask = ids[kept], F.pad(mask[kept], (0, ids.shape[1] - width), value=1)
        cache.reorder_cache(kept)
    return responses


def response_table(
    model: LogProbModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, seed: int, **limits: int
) -> pd.DataFrame:
    """Sample one response per prompt at temperature 1, with the limits `max_new_tokens` and `max_prompt_tokens`.

    The processes of a launch share the prompts.

    Returns:
        One row per prompt: `response`, text; `ids`, tokens; `finished`, whether it ends with the end token.
    """
    seed += this_process().process_index
    responses = share(
        len(prompts),
        lambda mine: sample(model, tokenizer, [prompts[i] for i in mine], temperature=1.0, seed=seed, **limits),
    )
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    finished = [ids[-1] == tokenizer.eos_token_id for ids in responses]
    return pd.DataFrame({"response": texts, "ids": responses, "finished": finished})
