"""Sampling of responses from the full distribution of a model: no top-k, no top-p."""

import logging
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dpo.common.distributed import share
from dpo.common.progress import progress
from dpo.engine.chat import Prompt, end_tokens
from dpo.engine.logprobs import LogProbModel
from dpo.engine.packing import budget_batches
from dpo.engine.sharding import together
from dpo.engine.tokenization import encode_pairs, prompt_ids

BLOCK = 256  # tokens of the vocabulary whose probabilities `draw` adds first

log = logging.getLogger(__name__)


def response_limit(
    setting: int | Literal["auto"], held_out: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> int:
    """Return the maximum number of tokens of a response, as `evaluate.max_new_tokens` sets it.

    `auto` is the 95% quantile of the tokens of the held-out completions, end token included, rounded up, but at
    most three quarters of `max_length`, so that prompts have room.
    """
    if setting != "auto":
        return setting
    rows = encode_pairs(held_out.to_dict("records"), tokenizer, max_length)
    longest = np.quantile([length for row in rows for length in row.lengths], 0.95)
    return min(math.ceil(longest), max_length * 3 // 4)


def proportional_first(prompts: Sequence[str], count: int) -> NDArray[np.int64]:
    """Return an order of N prompts in which the first `count` have the same share of each prompt as all, rounded.

    The first ones are a systematic sample: of the prompts sorted by text, every N / count-th. Both parts keep the
    order of the rows.
    """
    by_prompt = np.argsort(np.asarray(prompts, dtype=object), kind="stable")
    size = min(count, len(prompts))
    places = (np.arange(size) * len(prompts) + len(prompts) // 2) // max(size, 1)
    first = np.isin(np.arange(len(prompts)), by_prompt[places])
    return np.argsort(~first, kind="stable")


def sample(
    model: LogProbModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    max_tokens_per_batch: int = 16_384,
    max_prompt_tokens: int | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Sample one response per prompt.

    A batch has at most `max_tokens_per_batch` tokens, those of its prompts and `max_new_tokens` for each response.
    It is halved if memory runs out, unless the model is sharded. Prompts are shortened to `max_prompt_tokens`.

    Each response has random numbers of its own, given by the seed and by its number in `numbers` (default: 0 to
    R - 1). So it does not depend on the other prompts and batches, except for rounding, if the packed stream is
    exact for the model.

    Returns:
        Token ids of each response. A finished response ends with one of `end_ids`; one that was truncated at
        `max_new_tokens` does not.
    """
    rows = prompt_ids(tokenizer, prompts, max_prompt_tokens)
    numbers = range(len(rows)) if numbers is None else numbers
    random = torch.rand(
        max(numbers) + 1, max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )[list(numbers)]
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row]), rows[row]))
    places = budget_batches([len(rows[row]) + max_new_tokens for row in order], max_tokens_per_batch)
    batches = [[order[place] for place in batch] for batch in places]
    ends = end_ids(model.model.generation_config, tokenizer)
    respond = _decode if model.in_stream else _generate
    responses: dict[int, list[int]] = {}
    bar = progress(total=len(rows), desc="responses", unit="response", disable=len(rows) == 1)
    with torch.no_grad(), bar:
        while batches:
            batch = batches[0]
            try:
                made = respond(model, [rows[i] for i in batch], random[batch], temperature, ends)
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1 or model.sharded or not should_reduce_batch_size(error):
                    raise
                log.warning("out of memory with %d responses at once; continuing with half of them", len(batch))
                batches = [part for each in batches for part in (each[::2], each[1::2]) if part]
                made = None
            if made is None:  # outside the handler, whose traceback refers to the tensors of the batch
                clear_device_cache(garbage_collection=True)
                continue
            responses |= zip(batch, made, strict=True)
            del batches[0]
            bar.update(len(batch))
    return [responses[row] for row in range(len(rows))]


def end_ids(settings: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: of the chat template, the tokenizer and the model's settings."""
    given = getattr(settings, "eos_token_id", None)
    named = [] if given is None else [given] if isinstance(given, int) else list(given)
    return sorted({*tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer))), *named})


def draw(logits: Tensor, random: Tensor, temperature: float) -> Tensor:
    """Return one token per row [R] of fp32 logits [R, V], at random numbers [R] in [0, 1), by the inverse CDF.

    Probabilities are summed in fp32 within blocks of the vocabulary, and in fp64 over blocks and within the block
    of the token.
    """
    rows, size = logits.shape
    probabilities = (logits / temperature if temperature != 1 else logits).softmax(1)
    if size % BLOCK:
        probabilities = F.pad(probabilities, (0, -size % BLOCK))
    blocks = probabilities.view(rows, -1, BLOCK)
    sums = blocks.sum(2).double()
    block, rest = _first_above(sums, random.to(sums))
    inside, _ = _first_above(blocks[torch.arange(rows), block].double(), rest)
    return block * BLOCK + inside


def _first_above(weights: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column [R] that each random number hits among fp64 weights [R, n], and where in it, in [0, 1)."""
    edges = weights.cumsum(1)
    targets = random[:, None] * edges[:, -1:]
    columns = torch.searchsorted(edges, targets, right=True).clamp_max(weights.shape[1] - 1)
    chosen = weights.gather(1, columns)
    rest = (targets - edges.gather(1, columns) + chosen) / chosen
    return columns[:, 0], rest[:, 0].clamp(0, 1 - 2**-53)


def _decode(
    model: LogProbModel, prompts: list[list[int]], random: Tensor, temperature: float, ends: list[int]
) -> list[list[int]]:
    """Sample responses with the engine's own attention. A response leaves the batch when it is finished."""
    responses: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    logits, cache = model.start_responses(prompts, random.shape[1] - 1)
    for step in range(random.shape[1]):
        tokens = draw(logits, random[active, step], temperature)
        for row, token in zip(active, tokens.tolist(), strict=True):
            responses[row].append(token)
        unfinished = [place for place, row in enumerate(active) if responses[row][-1] not in ends]
        if not unfinished or step == random.shape[1] - 1:
            break
        kept = cache.keep(unfinished)
        active = [active[place] for place in kept]
        logits = model.continue_responses(tokens[kept], cache)
    return responses


def _generate(
    model: LogProbModel, prompts: list[list[int]], random: Tensor, temperature: float, ends: list[int]
) -> list[list[int]]:
    """Sample responses with the generator of transformers, for models that the packed stream does not support."""
    tokens = [torch.tensor(row, device=model.device) for row in prompts]
    ids, mask = (
        pad_sequence(rows, batch_first=True, padding_side="left")
        for rows in (tokens, [torch.ones_like(row) for row in tokens])
    )
    torch.manual_seed(int(random[0, 0] * 2**53))
    with model.generation() as generator:
        output = generator.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=random.shape[1],
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
    made = output[:, ids.shape[1] :].tolist()
    lengths = [next((place for place, token in enumerate(row, 1) if token in ends), len(row)) for row in made]
    return [row[:length] for row, length in zip(made, lengths, strict=True)]


def response_table(
    model: LogProbModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], **settings: int
) -> pd.DataFrame:
    """Sample one response per prompt at temperature 1, with further arguments of `sample`.

    The processes of a launch share the prompts.

    Returns:
        One row per prompt: `response`, text; `ids`, tokens; `finished`, whether it ends with an end token.
    """

    def sample_mine(mine: list[int]) -> list[list[int]]:
        return sample(model, tokenizer, [prompts[i] for i in mine], temperature=1.0, numbers=mine, **settings)

    responses = share(len(prompts), sample_mine, together(model))
    return as_table(responses, tokenizer, end_ids(model.model.generation_config, tokenizer))


def as_table(responses: list[list[int]], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> pd.DataFrame:
    """Return responses as the table that `response_table` describes. `ends` are the end tokens."""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    finished = [ids[-1] in ends for ids in responses]
    return pd.DataFrame({"response": texts, "ids": responses, "finished": finished})
