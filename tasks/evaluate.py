"""Stage `evaluate`: one policy against the reference on held-out data, `python -m tasks.evaluate BETA`."""

import pandas as pd
import torch
from transformers import AutoTokenizer

from dpo.batching import TokenRow
from dpo.config import load_params
from dpo.evaluation.judges import load_judge
from dpo.evaluation.preferences import judged_metrics, preference_metrics, sample_metrics
from dpo.evaluation.sampling import sample
from dpo.files import write_json, written_whole
from dpo.logps import load_model, sequence_logps
from dpo.reference import cache_key, load_reference
from dpo.tokens import encode_pairs, prompt_ids, prompt_of
from tasks.stage import (
    EVAL,
    REFERENCE_EVAL,
    REFERENCE_SAMPLES,
    SFT,
    beta_argument,
    evaluation,
    policy_folder,
    policy_samples,
    run,
)
from tasks.tracking import log_evaluation


def main() -> None:
    """Score, sample, judge, save."""
    beta = beta_argument()
    params = load_params()
    judge = None if params.evaluate.judge is None else load_judge(params.evaluate.judge)
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    table = pd.read_parquet(EVAL)
    engine = params.engine
    rows = encode_pairs(table.to_dict("records"), tokenizer, engine.max_length)
    key = cache_key(SFT, tokenizer, rows, engine.max_length, engine.precision)
    cached = load_reference(REFERENCE_EVAL, key)
    reference = torch.tensor([cached[row.id] for row in rows])
    baseline = pd.read_parquet(REFERENCE_SAMPLES)
    prompts = [prompt_of(pair, tokenizer) for pair in baseline.to_dict("records")]

    model = load_model(policy_folder(beta), engine.precision)
    policy = sequence_logps(model, rows, engine.tokens_per_batch, "policy log-probs")
    answers = sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=params.evaluate.max_new_tokens,
        temperature=params.evaluate.temperature,
        seed=params.seed,
    )
    answered = [
        TokenRow(str(number), tuple(prompt), (tuple(answer),))
        for number, (prompt, answer) in enumerate(zip(prompt_ids(tokenizer, prompts), answers, strict=True))
    ]
    under_policy = sequence_logps(model, answered, engine.tokens_per_batch, "answers under the policy")[:, 0]
    del model
    model = load_model(SFT, engine.precision)
    under_reference = sequence_logps(model, answered, engine.tokens_per_batch, "answers under the reference")[:, 0]

    samples = pd.DataFrame(
        {
            "prompt": baseline["prompt"],
            "reference": baseline["answer"],
            "policy": tokenizer.batch_decode(answers, skip_special_tokens=True),
            "policy_logp": under_policy.tolist(),
            "reference_logp": under_reference.tolist(),
        }
    )
    ceiling = table["agreement"].mean()
    metrics = {
        "beta": float(beta),
        "samples": len(samples),
        "human_ceiling": None if pd.isna(ceiling) else float(ceiling),
        **preference_metrics(policy, reference, float(beta), params.seed),
        **sample_metrics(under_policy, under_reference, [len(answer) for answer in answers], params.seed),
    }
    if judge is not None:
        scores = {side: judge(samples[side].tolist()) for side in ("policy", "reference")}
        samples = samples.assign(policy_score=scores["policy"], reference_score=scores["reference"])
        metrics |= judged_metrics(scores["policy"], scores["reference"], params.seed)
    with written_whole(policy_samples(beta)) as aside:
        samples.to_parquet(aside, index=False)
    write_json(evaluation(beta), metrics)
    log_evaluation(params, beta, table, metrics, samples)


if __name__ == "__main__":
    run(main)
