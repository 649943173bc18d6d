"""Stage `baseline`: the reference's own answers to held-out prompts and their scores, once for all policies."""

import pandas as pd
from transformers import AutoTokenizer

from dpo.config import load_params
from dpo.evaluation.judges import Scorer, load_judge
from dpo.evaluation.sampling import sample
from dpo.files import written_whole
from dpo.logps import load_model
from dpo.tokens import prompt_of
from tasks.stage import EVAL, REFERENCE_SAMPLES, SFT, run


def main() -> None:
    """Sample, score, save."""
    params = load_params()
    asked = params.evaluate
    judge = None if asked.judge is None else load_judge(asked.judge)
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    model = load_model(SFT, params.engine.precision)
    pairs = pd.read_parquet(EVAL)
    table = pairs.sample(asked.samples, replace=len(pairs) < asked.samples, random_state=params.seed)
    table = table[["prompt", "turns"]].reset_index(drop=True)
    prompts = [prompt_of(pair, tokenizer) for pair in table.to_dict("records")]
    answers = sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        seed=params.seed,
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    table["answer"], table["ids"] = texts, pd.Series(answers)
    table["finished"] = [answer[-1] == tokenizer.eos_token_id for answer in answers]
    if isinstance(judge, Scorer):
        table["score"] = judge.score(prompts, texts)
    with written_whole(REFERENCE_SAMPLES) as aside:
        table.to_parquet(aside, index=False)


if __name__ == "__main__":
    run(main)
