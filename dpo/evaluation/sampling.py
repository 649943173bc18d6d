"""Answers drawn from a policy by the transformers generator."""

from collections.abc import Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import EvaluateParams
from dpo.logps import generating
from dpo.tokens import Prompt, prompt_ids

ROWS_AT_ONCE = 48
"""Answers generated together: decoding is bound by reading the weights, so many rows cost little more than one."""


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """One answer a prompt, drawn from the whole distribution (no top-k, no top-p).

    Returns:
        Token ids of each answer; an answer that ended holds its end token, one that reached `max_new_tokens`
        does not.
    """
    end = tokenizer.eos_token_id
    pad = 0 if end is None else end
    answers: list[list[int]] = []
    torch.manual_seed(seed)
    with generating(model), tqdm(total=len(prompts), desc="answers", unit="row", disable=len(prompts) == 1) as bar:
        for first in range(0, len(prompts), ROWS_AT_ONCE):
            rows = prompt_ids(tokenizer, prompts[first : first + ROWS_AT_ONCE])
            width = max(map(len, rows))
            input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=pad,
            )
            for row in output[:, width:].tolist():
                answers.append(row[: row.index(end) + 1] if end in row else row)
            bar.update(len(rows))
    return answers


def answer_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    params: EvaluateParams,
    seed: int,
) -> pd.DataFrame:
    """One answer a prompt, by `sample` with the settings of `params`.

    Returns:
        One row a prompt: `answer`, its text; `ids`, its tokens; `finished`, whether it ended with the end token.
    """
    answers = sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        seed=seed,
    )
    return pd.DataFrame(
        {
            "answer": tokenizer.batch_decode(answers, skip_special_tokens=True),
            "ids": answers,
            "finished": [answer[-1] == tokenizer.eos_token_id for answer in answers],
        }
    )
