"""Stage `reference_samples`: sample the reference's responses to held-out prompts and score them once."""

import pandas as pd
from transformers import PreTrainedTokenizerBase

from dpo.common.distributed import this_process
from dpo.common.files import atomic_write
from dpo.config import Params, load_params
from dpo.engine.chat import Prompt, prompt_of
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.tokenization import prompt_ids
from dpo.evaluation.judges import load_judges
from dpo.evaluation.judges.accuracy import judge_accuracy
from dpo.evaluation.kl import divergence
from dpo.evaluation.sampling import proportional_first, response_limit, response_table
from dpo.evaluation.server_sampling import check_sampled, served_responses
from tasks.common.memory import check_memory
from tasks.common.paths import EVAL, REFERENCE, REFERENCE_SAMPLES
from tasks.common.runner import run_launched


def main() -> None:
    """Draw prompts, sample a response to each, and add the column `score/NAME` of each judge that scores.

    The first `evaluate.kl_samples` rows, on which KL is measured, have the same share of each prompt as all rows.
    The table's `attrs` have the accuracy of the judges on held-out pairs.
    """
    params = load_params()
    judges = load_judges(params.evaluate.judges)
    tokenizer = load_tokenizer(REFERENCE)
    check_memory("reference_samples", params, REFERENCE)
    pairs, count = pd.read_parquet(EVAL), params.evaluate.samples
    table = pairs.sample(count, replace=len(pairs) < count, random_state=params.seed)
    table = table[["prompt", "turns", "tools", "chat_template_kwargs", "source"]]
    order = proportional_first(table["prompt"].tolist(), params.evaluate.kl_samples or count)
    table = table.iloc[order].reset_index(drop=True)
    prompts = [prompt_of(pair, tokenizer) for pair in table.to_dict("records")]
    limit = response_limit(params.evaluate.max_new_tokens, pairs, tokenizer, params.engine.max_length)
    table = table.join(sample_responses(params, tokenizer, prompts, limit))
    if not this_process().is_main_process:
        return
    for judge in judges:
        scores = judge.score(prompts, table["response"].tolist())
        if scores is not None:
            table[f"score/{judge.name}"] = scores
    table.attrs |= judge_accuracy(judges, pairs, tokenizer, count, params.seed)
    with atomic_write(REFERENCE_SAMPLES) as tmp:
        table.to_parquet(tmp, index=False)


def sample_responses(
    params: Params, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], max_new_tokens: int
) -> pd.DataFrame:
    """Return one response per prompt, sampled from the reference."""
    engine, sampling = params.engine, params.sampling(max_new_tokens)
    served = served_responses(params.evaluate.sampler, engine, REFERENCE, tokenizer, prompts, sampling)
    model = load_model(REFERENCE, **engine.loading, frozen=True).to(this_process().device)
    if served is None:
        return response_table(model, tokenizer, prompts, **sampling)
    rows = prompt_ids(tokenizer, prompts[: params.evaluate.kl_samples], sampling["max_prompt_tokens"])
    responses = served["ids"].tolist()[: params.evaluate.kl_samples]
    scores = divergence(model, model, rows, responses, engine.max_tokens_per_microbatch)
    check_sampled(scores, [len(ids) for ids in responses], REFERENCE)
    return served


if __name__ == "__main__":
    run_launched(main)
