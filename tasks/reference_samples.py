"""Stage `reference_samples`: sample the reference's responses to held-out prompts and score them once."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from dpo.common.distributed import share, this_process
from dpo.common.files import atomic_write
from dpo.config import Params, load_params
from dpo.data.prompts import COLUMNS, prompt_table
from dpo.engine.chat import Prompt, prompt_of
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.sharding import together
from dpo.engine.token_table import open_table
from dpo.engine.tokenization import prompt_ids
from dpo.evaluation.bootstrap import bootstrap, mean
from dpo.evaluation.judges import Judge, against_base, load_judges, used_replies
from dpo.evaluation.judges.accuracy import judge_accuracy
from dpo.evaluation.kl import divergence
from dpo.evaluation.pair_metrics import perplexity
from dpo.evaluation.sampling import proportional_first, response_limit, response_table
from dpo.evaluation.server_sampling import check_sampled, served_responses
from tasks.common.memory import check_memory
from tasks.common.paths import BASE, EVAL, REFERENCE, REFERENCE_SAMPLES, REPLIES, TOKENS_EVAL, TRAIN
from tasks.common.runner import run_launched


def main() -> None:
    """Draw prompts, sample a response to each, and add the column `score/NAME` of each judge that scores.

    The first `evaluate.kl_samples` rows, on which KL is measured, have the same share of each prompt as all rows.
    If supervised fine-tuning made the reference, the columns `base_*` of these rows have the base model's
    responses. The table's `attrs` have the accuracy of the judges on held-out pairs, the base model's perplexity,
    and the reference's win rate against it.
    """
    params = load_params()
    judges = load_judges(params.evaluate.judges)
    tokenizer = load_tokenizer(REFERENCE)
    check_memory("reference_samples", params, REFERENCE)
    pairs, count = pd.read_parquet(EVAL), params.evaluate.samples
    table = pairs[COLUMNS]
    if params.evaluate.prompts is not None:
        table = prompt_table(params.evaluate.prompts, pd.read_parquet(TRAIN, columns=["prompt"])["prompt"])
        order = np.random.default_rng(params.seed).permutation(len(table))
        table = table.iloc[np.resize(order, count)]  # all prompts equally often, up to one
    else:
        table = table.sample(count, replace=len(table) < count, random_state=params.seed)
    order = proportional_first(table["prompt"].tolist(), params.evaluate.kl_samples or count)
    table = table.iloc[order].reset_index(drop=True)
    prompts = [prompt_of(pair, tokenizer) for pair in table.to_dict("records")]
    limit = response_limit(params.evaluate.max_new_tokens, pairs, tokenizer, params.engine.max_length)
    table = table.join(sample_responses(params, REFERENCE, tokenizer, prompts, limit))
    base: dict[str, Any] = {}
    if params.sft is not None and params.evaluate.base_model:
        first = prompts[: params.evaluate.kl_samples]
        table = table.join(sample_responses(params, BASE, tokenizer, first, limit).add_prefix("base_"))
        base = base_perplexity(params, pairs, tokenizer)
    if not this_process().is_main_process:
        return
    for judge in judges:
        for side in ("", "base_") if base else ("",):
            texts = table[f"{side}response"].dropna()
            scores = judge.score([prompts[row] for row in texts.index], texts.tolist())
            if scores is not None:
                table[f"{side}score/{judge.name}"] = pd.Series(scores, texts.index)
    if base and judges:
        base |= reference_against_base(judges[0], prompts, table, params.seed)
    table.attrs |= base | judge_accuracy(judges, pairs, tokenizer, count, params.seed)
    if replies := used_replies(judges):
        table.attrs[REPLIES] = replies
    with atomic_write(REFERENCE_SAMPLES) as tmp:
        table.to_parquet(tmp, index=False)


def sample_responses(
    params: Params, folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], max_new_tokens: int
) -> pd.DataFrame:
    """Return one response per prompt, sampled from the checkpoint in `folder`."""
    engine, sampling = params.engine, params.sampling(max_new_tokens)
    served = served_responses(params.evaluate.sampler, engine, folder, tokenizer, prompts, sampling)
    model = load_model(folder, **engine.loading, frozen=True).to(this_process().device)
    if served is None:
        return response_table(model, tokenizer, prompts, **sampling)
    rows = prompt_ids(tokenizer, prompts[: params.evaluate.kl_samples], sampling["max_prompt_tokens"])
    responses = served["ids"].tolist()[: params.evaluate.kl_samples]
    scores = divergence(model, model, rows, responses, engine.max_tokens_per_microbatch)
    check_sampled(scores, [len(ids) for ids in responses], folder)
    return served


def base_perplexity(params: Params, held_out: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the base model's perplexity on the completions of which that of each policy is measured."""
    rows = open_table(TOKENS_EVAL, EVAL, tokenizer, params.engine.max_length)
    model = load_model(BASE, **params.engine.loading, frozen=True).to(this_process().device)
    max_tokens = params.engine.max_tokens_per_microbatch
    logps = share(
        len(rows),
        lambda mine: sequence_logps(model, rows.select(mine), max_tokens, "base log-probs").tolist(),
        together(model),
    )
    sides = slice(1) if rows.labels or params.imitated == "chosen" else slice(None)  # a label's row has one text
    counted = held_out["chosen"].notna() if params.imitated == "chosen" else pd.Series(True, held_out.index)
    sums = pd.DataFrame(
        {"logp": [sum(each[sides]) for each in logps], "tokens": [sum(row.lengths[sides]) for row in rows]}
    ).where(counted.reset_index(drop=True), 0)
    return perplexity("base_perplexity", sums["logp"], sums["tokens"], held_out["prompt"].tolist(), params.seed)


def reference_against_base(judge: Judge, prompts: list[Prompt], table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return the reference's win rate against the base model by the first judge, and the latter's score."""
    wins = against_base(judge, prompts, table, table.get(f"score/{judge.name}"), table)
    statistics = {"reference_base_win_rate": mean(wins)}
    if f"base_score/{judge.name}" in table:
        statistics["base_reward"] = mean(table[f"base_score/{judge.name}"])
    return bootstrap(statistics, table["prompt"].tolist(), seed)


if __name__ == "__main__":
    run_launched(main)
