"""Stage `reference`: the reference's log-probs of every pair, and its answers to held-out prompts."""

import pandas as pd
from transformers import AutoTokenizer

from dpo.config import load_params
from dpo.evaluation.sampling import sample
from dpo.files import written_whole
from dpo.logps import load_model, sequence_logps
from dpo.reference import cache_key, save_reference
from dpo.tokens import encode_pairs
from tasks.stage import EVAL, REFERENCE_EVAL, REFERENCE_SAMPLES, REFERENCE_TRAIN, SFT, TRAIN, run


def main() -> None:
    """Score, sample, save."""
    params = load_params()
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    model = load_model(str(SFT))
    for source, folder in ((TRAIN, REFERENCE_TRAIN), (EVAL, REFERENCE_EVAL)):
        rows = encode_pairs(pd.read_parquet(source).to_dict("records"), tokenizer, params.tokens.max_length)
        logps = sequence_logps(model, rows, params.tokens.tokens_per_batch, f"reference log-probs, {source.stem}")
        save_reference(folder, cache_key(SFT, tokenizer, rows, params.tokens.max_length), rows, logps)
    pairs = pd.read_parquet(EVAL)
    prompts = (
        pairs["prompt"]
        .sample(params.evaluate.samples, replace=len(pairs) < params.evaluate.samples, random_state=params.seed)
        .tolist()
    )
    answers = sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=params.evaluate.max_new_tokens,
        temperature=params.evaluate.temperature,
        seed=params.seed,
    )
    with written_whole(REFERENCE_SAMPLES) as aside:
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        pd.DataFrame({"prompt": prompts, "answer": texts, "tokens": answers}).to_parquet(aside, index=False)


if __name__ == "__main__":
    run(main)
