"""Stage `reference_samples`: sample the reference's responses to held-out prompts and score them."""

import pandas as pd

from dpo.common.distributed import this_process
from dpo.common.files import atomic_write
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.tokenization import prompt_of
from dpo.evaluation.judges.scorer import Scorer, load_judge
from dpo.evaluation.sampling import answer_table
from tasks.common.paths import EVAL, REFERENCE, REFERENCE_SAMPLES
from tasks.common.runner import run_launched


def main() -> None:
    """Sample, score, save."""
    params = load_params()
    asked = params.evaluate
    judge = load_judge(asked.judge)
    tokenizer = load_tokenizer(REFERENCE)
    state = this_process()
    model = load_model(REFERENCE, params.engine.precision, params.engine.compile).to(state.device)
    pairs = pd.read_parquet(EVAL)
    table = pairs.sample(asked.samples, replace=len(pairs) < asked.samples, random_state=params.seed)
    table = table[["prompt", "turns"]].reset_index(drop=True)
    prompts = [prompt_of(pair, tokenizer) for pair in table.to_dict("records")]
    table = table.join(answer_table(model, tokenizer, prompts, **params.sampling))
    if not state.is_main_process:
        return
    if isinstance(judge, Scorer):
        table["score"] = judge.score(prompts, table["answer"].tolist())
    with atomic_write(REFERENCE_SAMPLES) as tmp:
        table.to_parquet(tmp, index=False)


if __name__ == "__main__":
    run_launched(main)
