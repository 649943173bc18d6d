"""Stage `reference`: the reference's log-probs of every pair."""

import pandas as pd
from transformers import AutoTokenizer

from dpo.config import load_params
from dpo.logps import load_model
from dpo.reference import cache_key, compute_reference
from dpo.tokens import encode_pairs
from tasks.stage import EVAL, REFERENCE_EVAL, REFERENCE_PROGRESS, REFERENCE_TRAIN, SFT, TRAIN, run


def main() -> None:
    """Score, save."""
    engine = load_params().engine
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    model = load_model(SFT, engine.precision)
    for source, folder in ((TRAIN, REFERENCE_TRAIN), (EVAL, REFERENCE_EVAL)):
        rows = encode_pairs(pd.read_parquet(source).to_dict("records"), tokenizer, engine.max_length)
        key = cache_key(SFT, tokenizer, rows, engine.max_length, engine.precision)
        compute_reference(folder, key, model, rows, engine.tokens_per_batch, REFERENCE_PROGRESS)


if __name__ == "__main__":
    run(main)
