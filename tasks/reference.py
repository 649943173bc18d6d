"""Stage `reference`: the reference's log-probs of every pair, and its answers to held-out prompts."""

import pandas as pd
from transformers import AutoTokenizer

from dpo.config import load_params
from dpo.evaluation.sampling import sample
from dpo.files import written_whole
from dpo.logps import load_model
from dpo.reference import cache_key, compute_reference
from dpo.tokens import encode_pairs, prompt_of
from tasks.stage import (
    EVAL,
    REFERENCE_EVAL,
    REFERENCE_PROGRESS,
    REFERENCE_SAMPLES,
    REFERENCE_TRAIN,
    SFT,
    TRAIN,
    run,
)


def main() -> None:
    """Score, sample, save."""
    params = load_params()
    engine = params.engine
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    model = load_model(SFT, engine.precision)
    for source, folder in ((TRAIN, REFERENCE_TRAIN), (EVAL, REFERENCE_EVAL)):
        rows = encode_pairs(pd.read_parquet(source).to_dict("records"), tokenizer, engine.max_length)
        key = cache_key(SFT, tokenizer, rows, engine.max_length, engine.precision)
        compute_reference(folder, key, model, rows, engine.tokens_per_batch, REFERENCE_PROGRESS)
    pairs = pd.read_parquet(EVAL)
    replace = len(pairs) < params.evaluate.samples
    asked = pairs.sample(params.evaluate.samples, replace=replace, random_state=params.seed)[["prompt", "turns"]]
    answers = sample(
        model,
        tokenizer,
        [prompt_of(pair, tokenizer) for pair in asked.to_dict("records")],
        max_new_tokens=params.evaluate.max_new_tokens,
        temperature=params.evaluate.temperature,
        seed=params.seed,
    )
    with written_whole(REFERENCE_SAMPLES) as aside:
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        asked.assign(answer=texts, tokens=pd.Series(answers, asked.index)).to_parquet(aside, index=False)


if __name__ == "__main__":
    run(main)
