"""Stage `baseline`: the reference's own answers to held-out prompts and their scores, once for all policies."""

import pandas as pd

from dpo.config import load_params
from dpo.evaluation.judges import Scorer, load_judge
from dpo.evaluation.sampling import answer_table
from dpo.files import written_whole
from dpo.loading import load_tokenizer
from dpo.logps import load_model
from dpo.processes import this_process
from dpo.tokens import prompt_of
from tasks.stage import EVAL, REFERENCE_SAMPLES, SFT, run_launched


def main() -> None:
    """Sample, score, save."""
    params = load_params()
    asked = params.evaluate
    judge = load_judge(asked.judge)
    tokenizer = load_tokenizer(SFT)
    state = this_process()
    model = load_model(SFT, params.engine.precision, params.engine.compile).to(state.device)
    pairs = pd.read_parquet(EVAL)
    table = pairs.sample(asked.samples, replace=len(pairs) < asked.samples, random_state=params.seed)
    table = table[["prompt", "turns"]].reset_index(drop=True)
    prompts = [prompt_of(pair, tokenizer) for pair in table.to_dict("records")]
    table = table.join(answer_table(model, tokenizer, prompts, params))
    if not state.is_main_process:
        return
    if isinstance(judge, Scorer):
        table["score"] = judge.score(prompts, table["answer"].tolist())
    with written_whole(REFERENCE_SAMPLES) as aside:
        table.to_parquet(aside, index=False)


if __name__ == "__main__":
    run_launched(main)
