"""Stage `evaluate`: one policy against the reference on held-out data, `python -m tasks.evaluate TRIAL`."""

import dataclasses
from typing import Any

import pandas as pd
import torch

from dpo.common.distributed import share, this_process
from dpo.common.files import atomic_write, write_json
from dpo.config import load_params
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import cache_key, load_reference
from dpo.engine.tokenization import encode_pairs, prompt_ids, prompt_of
from dpo.evaluation.judges.scorer import Scorer, load_judge, score_wins
from dpo.evaluation.kl import divergence
from dpo.evaluation.pair_metrics import pair_table, preference_metrics
from dpo.evaluation.response_metrics import answer_metrics
from dpo.evaluation.sampling import answer_table
from dpo.training.losses import implicit_rewards
from tasks.common.paths import (
    EVAL,
    REFERENCE,
    REFERENCE_EVAL,
    REFERENCE_SAMPLES,
    evaluation,
    policy_folder,
    policy_margins,
    policy_samples,
)
from tasks.common.runner import run_launched, trial_argument
from tasks.report.card import write_card
from tasks.tracking.provenance import weights
from tasks.tracking.runs import log_evaluation


def main() -> None:
    """Score, sample, judge, save."""
    params = load_params()
    trial = trial_argument(params)
    engine, asked = params.engine, params.evaluate
    judge = load_judge(asked.judge)
    tokenizer = load_tokenizer(REFERENCE)
    held_out = pd.read_parquet(EVAL)
    rows = encode_pairs(held_out.to_dict("records"), tokenizer, engine.max_length)
    key = cache_key(REFERENCE, tokenizer, rows, engine)
    cached = load_reference(REFERENCE_EVAL, key)
    baseline = pd.read_parquet(REFERENCE_SAMPLES)
    prompts = [prompt_of(pair, tokenizer) for pair in baseline.to_dict("records")]

    state = this_process()
    model = load_model(policy_folder(trial), engine.precision, engine.compile).to(state.device)

    def score(mine: list[int]) -> list[Any]:
        return sequence_logps(
            model, [rows[i] for i in mine], engine.max_tokens_per_microbatch, "policy log-probs"
        ).tolist()

    def distances(mine: list[int]) -> list[Any]:
        to = load_model(REFERENCE, engine.precision, engine.compile).to(state.device)
        asking = prompt_ids(tokenizer, [prompts[i] for i in mine], params.max_prompt_tokens)
        return divergence(model, to, asking, [ids[i] for i in mine], engine.max_tokens_per_microbatch).to_dict(
            "records"
        )

    pairs = pair_table(
        held_out,
        torch.tensor(share(len(rows), score)),
        torch.tensor([cached[row.id] for row in rows]),
        torch.tensor([[len(ids) for ids in row.completions] for row in rows]),
        trial,
        params.losses,
    )
    answers = answer_table(model, tokenizer, prompts, **params.sampling)
    ids, texts = answers["ids"].tolist(), answers["answer"].tolist()
    apart = pd.DataFrame(share(len(prompts), distances))
    if not state.is_main_process:
        return
    logps, reference_logps = (torch.tensor(apart[name].to_numpy()) for name in ("policy_logp", "reference_logp"))
    lengths = torch.tensor([len(tokens) for tokens in ids])
    rewards = implicit_rewards(logps, reference_logps, lengths, trial.beta, trial.loss)
    samples = pd.DataFrame(
        {
            "prompt": baseline["prompt"],
            "reference": baseline["answer"],
            "policy": texts,
            "reference_ids": baseline["ids"],
            "policy_ids": ids,
            "reference_finished": baseline["finished"],
            "policy_finished": answers["finished"],
            **apart,
            "implicit_reward": rewards.numpy(),
        }
    )
    if isinstance(judge, Scorer):
        samples["policy_score"] = judge.score(prompts, texts)
        samples["reference_score"] = baseline["score"]
        samples["win"] = score_wins(samples["policy_score"], samples["reference_score"])
    elif judge is not None:
        samples["win"] = judge.compare(prompts, texts, baseline["answer"].tolist())

    metrics = {
        "trial": dataclasses.asdict(trial),
        "weights": weights(policy_folder(trial))[:16],
        **preference_metrics(pairs, params.seed, completions=params.sft.completions),
        **answer_metrics(samples, params.seed),
    }
    for path, table in ((policy_margins(trial), pairs), (policy_samples(trial), samples)):
        with atomic_write(path) as tmp:
            table.to_parquet(tmp, index=False)
    write_json(evaluation(trial), metrics)
    write_card(params, trial, metrics)
    log_evaluation(params, trial, held_out, metrics, samples.drop(columns=["policy_ids", "reference_ids"]))


if __name__ == "__main__":
    run_launched(main)
