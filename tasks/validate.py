"""Stage `validate`: no pair goes on unless it keeps the contract and fits the model's token limit."""

import pandas as pd
from transformers import AutoTokenizer

from dpo.config import load_params
from dpo.files import write_json, written_whole
from dpo.preferences.contract import check
from dpo.tokens import encode_pairs
from tasks.stage import BASE, EVAL, METRICS, PREFERENCES, TRAIN, run


def main() -> None:
    """Check, measure, split."""
    max_length = load_params().engine.max_length
    table = check(pd.read_parquet(PREFERENCES), str(PREFERENCES))
    rows = encode_pairs(table.to_dict("records"), AutoTokenizer.from_pretrained(BASE), max_length)
    tokens = pd.Series([row.tokens for row in rows])
    longer = table["chosen"].str.len() > table["rejected"].str.len()
    counts: dict[str, object] = {
        "tokens_per_pair_median": float(tokens.median()),
        "tokens_per_pair_max": int(tokens.max()),
        "chosen_longer_share": float(longer.mean()),
    }
    for split, path in (("train", TRAIN), ("eval", EVAL)):
        part = table[table["split"] == split]
        agreement = part["agreement"].mean()
        counts[split] = {
            "pairs": len(part),
            "prompts": int(part["prompt"].nunique()),
            "human_ceiling": None if pd.isna(agreement) else float(agreement),
        }
        with written_whole(path) as aside:
            part.to_parquet(aside, index=False)
    write_json(METRICS / "validate.json", counts)


if __name__ == "__main__":
    run(main)
