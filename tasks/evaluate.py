"""Stage `evaluate`: compare one policy with the reference on held-out data: `python -m tasks.evaluate TRIAL`."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from dpo.common.distributed import share, this_process
from dpo.common.files import atomic_write, write_json
from dpo.config import Params, load_params
from dpo.engine.chat import Prompt, prompt_of
from dpo.engine.logprobs import LogProbModel, load_model, sequence_logps
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import cache_key, load_reference
from dpo.engine.sharding import together
from dpo.engine.token_table import open_table
from dpo.engine.tokenization import prompt_ids
from dpo.evaluation.judges import Judge, against_base, load_judges, used_replies
from dpo.evaluation.kl import divergence
from dpo.evaluation.label_metrics import label_metrics, label_table
from dpo.evaluation.pair_metrics import pair_table, preference_metrics
from dpo.evaluation.response_metrics import response_metrics
from dpo.evaluation.sampling import response_limit, response_table
from dpo.evaluation.server_sampling import check_sampled, served_responses
from dpo.training.settings import Trial
from tasks.common import paths
from tasks.common.memory import check_memory
from tasks.common.runner import check_store, run_launched, trial_argument
from tasks.report.card import write_card
from tasks.tracking.provenance import weights


def main() -> None:
    """Evaluate one policy and save metrics, pairs, samples and model card."""
    params = load_params()
    check_store()
    trial = trial_argument(params)
    judges = load_judges(params.evaluate.judges)
    tokenizer = load_tokenizer(paths.REFERENCE)
    held_out = pd.read_parquet(paths.EVAL)
    reference = pd.read_parquet(paths.REFERENCE_SAMPLES)
    reference.attrs.pop(paths.REPLIES, None)
    prompts = [prompt_of(pair, tokenizer) for pair in reference.to_dict("records")]
    state, folder = this_process(), paths.policy_folder(trial)
    check_memory("evaluate", params, paths.REFERENCE)
    limit = response_limit(params.evaluate.max_new_tokens, held_out, tokenizer, params.engine.max_length)
    served = served_responses(
        params.evaluate.sampler, params.engine, folder, tokenizer, prompts, params.sampling(limit)
    )
    policy = load_model(folder, **params.engine.loading, frozen=True).to(state.device)

    pairs = evaluate_pairs(params, trial, policy, tokenizer, held_out)
    samples = sample_responses(params, trial, policy, tokenizer, prompts, limit, served)
    if not state.is_main_process:
        return
    samples = compare_responses(judges, prompts, samples, reference)
    metrics = {
        "trial": trial.settings,
        "weights": weights(folder)[:16],
        "sampler": params.evaluate.sampler.kind,
        "cost": json.loads(paths.cost(trial).read_text()),
        **preference_metrics(pairs, params.seed, completions=params.imitated),
        **label_metrics(pairs, params.seed),
        **response_metrics(samples, params.seed),
        **{str(name): value for name, value in reference.attrs.items()},
    }
    if replies := used_replies(judges):
        samples.attrs[paths.REPLIES] = replies
    for path, table in ((paths.policy_margins(trial), pairs), (paths.policy_samples(trial), samples)):
        with atomic_write(path) as tmp:
            table.to_parquet(tmp, index=False)
    write_json(paths.evaluation(trial), metrics)
    write_card(params, trial, metrics)
    from tasks.tracking.runs import log_evaluation  # after the evaluation: MLflow starts slowly

    log_evaluation(params, trial, metrics, samples.drop(columns=["ids", "reference_ids"]))


def evaluate_pairs(
    params: Params, trial: Trial, policy: LogProbModel, tokenizer: PreTrainedTokenizerBase, held_out: pd.DataFrame
) -> pd.DataFrame:
    """Return rewards, margin and loss of each held-out pair; the processes of a launch share the pairs."""
    max_tokens = params.engine.max_tokens_per_microbatch
    rows = open_table(paths.TOKENS_EVAL, paths.EVAL, tokenizer, params.engine.max_length)
    cached = load_reference(paths.REFERENCE_EVAL, cache_key(paths.REFERENCE, tokenizer, rows, params.engine))
    logps = share(
        len(rows),
        lambda mine: sequence_logps(policy, rows.select(mine), max_tokens, "policy log-probs").tolist(),
        together(policy),
    )
    lengths = torch.tensor([row.lengths for row in rows])
    reference = torch.tensor([cached[each] for each in rows.ids])
    if rows.labels:
        return label_table(held_out, torch.tensor(logps), reference, lengths, trial)
    return pair_table(held_out, torch.tensor(logps), reference, lengths, trial)


def sample_responses(
    params: Params,
    trial: Trial,
    policy: LogProbModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    max_new_tokens: int,
    served: pd.DataFrame | None,
) -> pd.DataFrame:
    """Return the responses (sampled here unless `served`) with KL to the reference and implicit reward.

    Both are NaN after the first `evaluate.kl_samples` rows.
    """
    sampling = params.sampling(max_new_tokens)
    samples = response_table(policy, tokenizer, prompts, **sampling) if served is None else served
    responses = samples["ids"].tolist()[: params.evaluate.kl_samples]

    reference = None  # the policy with another adapter, or none
    if not policy.share_base(paths.REFERENCE):
        reference = load_model(paths.REFERENCE, **params.engine.loading, frozen=True).to(policy.device)
    models = [policy] if reference is None else [policy, reference]

    def kl_to_reference(mine: list[int]) -> list[Any]:
        prompt_tokens = prompt_ids(tokenizer, [prompts[i] for i in mine], sampling["max_prompt_tokens"])
        max_tokens = params.engine.max_tokens_per_microbatch
        table = divergence(policy, reference, prompt_tokens, [responses[i] for i in mine], max_tokens)
        return table.to_dict("records")

    kl = pd.DataFrame(share(len(responses), kl_to_reference, together(*models)))
    logps, reference_logps = (torch.tensor(kl[name].to_numpy()) for name in ("policy_logp", "reference_logp"))
    lengths = torch.tensor([len(ids) for ids in responses])
    if served is not None:
        check_sampled(kl, lengths.tolist(), paths.policy_folder(trial))
    rewards = trial.loss.rewards(logps, reference_logps, lengths, trial.beta)
    return samples.join(kl.assign(implicit_reward=rewards.numpy()))


def compare_responses(
    judges: Sequence[Judge], prompts: list[Prompt], samples: pd.DataFrame, reference: pd.DataFrame
) -> pd.DataFrame:
    """Add the responses of the reference and of the base model, and each judge's columns.

    Columns of further judges end in `/NAME`. `base_win` is against the base model, if it was sampled.
    """
    columns = reference[["prompt", "response", "ids", "finished"]].add_prefix("reference_")
    samples = columns.rename(columns={"reference_prompt": "prompt"}).join(samples)
    samples = samples.join(reference.filter(["base_response"]))
    responses, others = samples["response"].tolist(), samples["reference_response"].tolist()
    for number, judge in enumerate(judges):
        verdicts = judge.compare(prompts, responses, others, reference.get(f"score/{judge.name}"))
        verdicts = verdicts.rename(columns={"other_score": "reference_score"})
        suffix = f"/{judge.name}" if number else ""
        samples = samples.join(verdicts.add_suffix(suffix))
        if "base_response" in reference:
            wins = against_base(judge, prompts, samples, samples.get(f"score{suffix}"), reference)
            samples[f"base_win{suffix}"] = wins
    return samples


if __name__ == "__main__":
    run_launched(main)
