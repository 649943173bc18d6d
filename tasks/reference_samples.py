"""Stage `reference_samples`: sample the reference's responses to held-out prompts and score them once."""

import pandas as pd

from dpo.common.distributed import this_process
from dpo.common.files import atomic_write
from dpo.config import load_params
from dpo.engine.chat import prompt_of
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.evaluation.judges import load_judges
from dpo.evaluation.sampling import response_limit, response_table
from tasks.common.paths import EVAL, REFERENCE, REFERENCE_SAMPLES
from tasks.common.runner import run_launched


def main() -> None:
    """Draw prompts, sample a response to each, and add the column `score/NAME` of each judge that scores."""
    params = load_params()
    judges = load_judges(params.evaluate.judges)
    tokenizer = load_tokenizer(REFERENCE)
    model = load_model(REFERENCE, **params.engine.loading, frozen=True).to(this_process().device)
    pairs, count = pd.read_parquet(EVAL), params.evaluate.samples
    table = pairs.sample(count, replace=len(pairs) < count, random_state=params.seed)
    table = table[["prompt", "turns", "tools"]].reset_index(drop=True)
    prompts = [prompt_of(pair, tokenizer) for pair in table.to_dict("records")]
    limit = response_limit(params.evaluate.max_new_tokens, pairs, tokenizer, params.engine.max_length)
    table = table.join(response_table(model, tokenizer, prompts, **params.sampling(limit)))
    if not this_process().is_main_process:
        return
    for judge in judges:
        scores = judge.score(prompts, table["response"].tolist())
        if scores is not None:
            table[f"score/{judge.name}"] = scores
    with atomic_write(REFERENCE_SAMPLES) as tmp:
        table.to_parquet(tmp, index=False)


if __name__ == "__main__":
    run_launched(main)
