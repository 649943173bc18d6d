"""Stage `evaluate`: one policy against the reference on held-out data, `python -m tasks.evaluate CELL`."""

import dataclasses
from typing import Any

import pandas as pd
import torch

from dpo.config import load_params
from dpo.evaluation.answers import answer_metrics
from dpo.evaluation.divergence import divergence
from dpo.evaluation.judges import Scorer, load_judge, score_wins
from dpo.evaluation.preferences import pair_table, preference_metrics
from dpo.evaluation.sampling import answer_table
from dpo.files import write_json, written_whole
from dpo.loading import load_tokenizer
from dpo.logps import load_model, sequence_logps
from dpo.losses import implicit_rewards
from dpo.processes import share, this_process
from dpo.reference import cache_key, load_reference
from dpo.tokens import encode_pairs, prompt_ids, prompt_of
from tasks.card import write_card
from tasks.provenance import weights
from tasks.stage import (
    EVAL,
    REFERENCE_EVAL,
    REFERENCE_SAMPLES,
    SFT,
    cell_argument,
    evaluation,
    policy_folder,
    policy_margins,
    policy_samples,
    run_launched,
)
from tasks.tracking import log_evaluation


def main() -> None:
    """Score, sample, judge, save."""
    params = load_params()
    cell = cell_argument(params)
    engine, asked = params.engine, params.evaluate
    judge = load_judge(asked.judge)
    tokenizer = load_tokenizer(SFT)
    held_out = pd.read_parquet(EVAL)
    rows = encode_pairs(held_out.to_dict("records"), tokenizer, engine.max_length)
    key = cache_key(SFT, tokenizer, rows, engine)
    cached = load_reference(REFERENCE_EVAL, key)
    baseline = pd.read_parquet(REFERENCE_SAMPLES)
    prompts = [prompt_of(pair, tokenizer) for pair in baseline.to_dict("records")]

    state = this_process()
    model = load_model(policy_folder(cell), engine.precision, engine.compile).to(state.device)

    def score(mine: list[int]) -> list[Any]:
        return sequence_logps(model, [rows[i] for i in mine], engine.tokens_per_batch, "policy log-probs").tolist()

    def distances(mine: list[int]) -> list[Any]:
        to = load_model(SFT, engine.precision, engine.compile).to(state.device)
        asking = prompt_ids(tokenizer, [prompts[i] for i in mine], params.longest_prompt)
        return divergence(model, to, asking, [ids[i] for i in mine], engine.tokens_per_batch).to_dict("records")

    pairs = pair_table(
        held_out,
        torch.tensor(share(len(rows), score)),
        torch.tensor([cached[row.id] for row in rows]),
        torch.tensor([[len(ids) for ids in row.completions] for row in rows]),
        cell,
        params.losses,
    )
    answers = answer_table(model, tokenizer, prompts, params)
    ids, texts = answers["ids"].tolist(), answers["answer"].tolist()
    apart = pd.DataFrame(share(len(prompts), distances))
    if not state.is_main_process:
        return
    logps, reference_logps = (torch.tensor(apart[name].to_numpy()) for name in ("policy_logp", "reference_logp"))
    lengths = torch.tensor([len(tokens) for tokens in ids])
    rewards = implicit_rewards(logps, reference_logps, lengths, cell.beta, cell.loss)
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
        "cell": dataclasses.asdict(cell),
        "weights": weights(policy_folder(cell))[:16],
        **preference_metrics(pairs, params.seed, completions=params.sft.completions),
        **answer_metrics(samples, params.seed),
    }
    for path, table in ((policy_margins(cell), pairs), (policy_samples(cell), samples)):
        with written_whole(path) as aside:
            table.to_parquet(aside, index=False)
    write_json(evaluation(cell), metrics)
    write_card(params, cell, metrics)
    log_evaluation(params, cell, held_out, metrics, samples.drop(columns=["policy_ids", "reference_ids"]))


if __name__ == "__main__":
    run_launched(main)
