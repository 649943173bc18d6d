"""Train and evaluate the policy of one case with the library."""

import resource
import shutil
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import comb

from benchmarks.evidence.plan import Case, best_of
from benchmarks.evidence.products import BENCHMARKS, Products
from benchmarks.measure import reset_peak
from dpo.common.distributed import this_process
from dpo.common.files import atomic_write, link_tree
from dpo.engine.flops import Cost, cost_of
from dpo.engine.logprobs import load_model
from dpo.engine.tokenization import prompt_ids
from dpo.evaluation.kl import divergence
from dpo.evaluation.sampling import response_table
from dpo.online.dpo_rounds import DpoRounds
from dpo.online.rloo_rounds import FILE as ADVANTAGES
from dpo.online.rloo_rounds import RlooRounds
from dpo.online.rounds import Rounds, drawn_prompts
from dpo.training.checkpoints import CheckpointStore
from dpo.training.settings import Trial
from dpo.training.train import save_checkpoint, train_dpo

METHODS: dict[str, type[Rounds]] = {"online": DpoRounds, "rloo": RlooRounds}
CHECKPOINT_MINUTES = 10


@dataclass(frozen=True)
class Trained:
    """A trained policy and what its training took."""

    policy: Path
    cost: Cost
    counts: dict[str, Any] = field(default_factory=dict)


def measure(case: Case, cache: Path) -> dict[str, Any]:
    """Return the result of a case. What the seed shares is built before if it is missing."""
    reset_peak()
    products, start = Products(case.params, cache), time.monotonic()
    if case.trial is None:
        table = best_of_n(products, best_of(case.method) or 1)
        trained = Trained(products.reference, products.reward_cost if products.uses_reward_model else Cost())
        trained.counts["judged_answers"] = len(table)
        trained_at, peak = time.monotonic(), peak_gib()
    else:
        work = products.folder / "work" / f"{case.name}-{case.settings}"
        trained = train(products, case.trial, work)
        trained_at, peak = time.monotonic(), peak_gib()
        table = evaluate(products, trained.policy, case.name)
        shutil.rmtree(work)
    seconds = {"training": trained_at - start, "evaluation": time.monotonic() - trained_at}
    return {
        "metrics": metrics(table),
        "prompts": by_prompt(table, sorted(set(products.reference_samples["prompt"]))),
        "cost": asdict(trained.cost) | {"human_pairs": len(products.train)} | trained.counts,
        "seconds": seconds | {"threads": torch.get_num_threads()},
        "device": device(),
        "peak_memory_gib": peak,
    }


def train(products: Products, trial: Trial, work: Path) -> Trained:
    """Train the policy of a trial in the folder `work`. An interrupted training resumes from there."""
    params = products.params
    store = CheckpointStore(work / "steps", CHECKPOINT_MINUTES)
    if trial.method is None:
        return train_on_pairs(products, trial, work / "policy", store)
    reference, shared = products.reference, products.first_round(trial)
    rounds = METHODS[trial.method](
        reference, work / "rounds", products.feedback, trial, params.online, params.dpo, params.engine,
        params.validate, params.sampling(products.limit), BENCHMARKS, store,
    )  # fmt: skip
    first = work / "rounds" / "round-1"
    if shared.is_dir() and not first.is_dir():  # all betas sample the first round from the reference
        first.parent.mkdir(parents=True, exist_ok=True)
        link_tree(shared, first)
    outcome = rounds.run(drawn_prompts(products.train, params.online, trial.seed))
    with products.lock:
        if not shared.is_dir():
            with atomic_write(shared) as tmp:
                shutil.copytree(first, tmp, ignore=shutil.ignore_patterns(ADVANTAGES))  # those depend on beta
    names = {"pairs": "pairs", "judged_answers": "answers"}
    counts = {name: sum(each.get(key, 0) for each in outcome.counts) for name, key in names.items()}
    cost = outcome.cost + trained_cost(outcome.log)
    if products.uses_reward_model:
        cost, counts["reward_model_flops"] = cost + products.reward_cost, products.reward_cost.flops
    counts["mean_scores"] = [each["mean_score"] for each in outcome.counts]
    return Trained(outcome.policy, cost, counts)


def train_on_pairs(products: Products, trial: Trial, policy: Path, store: CheckpointStore) -> Trained:
    """Train on the pairs of the data."""
    params, rows = products.params, products.train_rows
    needs_reference = "reference" in trial.loss.needs
    table = products.train[["id", "weight", "agreement"]]
    model = load_model(products.reference, **params.engine.loading, frozen=False)
    log = train_dpo(
        model, rows, products.reference_logps if needs_reference else {}, params.dpo, trial, store=store,
        max_tokens_per_microbatch=params.engine.max_tokens_per_microbatch,
        weights=_known(table, "weight"), agreement=_known(table, "agreement"),
    )  # fmt: skip
    save_checkpoint(model, products.tokenizer, policy, {})
    scored = cost_of(rows, model.model.config, "scored") if needs_reference else Cost()
    return Trained(policy, scored + trained_cost(log), {"pairs": len(rows)})


def _known(table: pd.DataFrame, column: str) -> dict[str, float]:
    known = table[table[column].notna()]
    return dict(zip(known["id"].tolist(), known[column].tolist(), strict=True))


def trained_cost(log: Sequence[Mapping[str, float]]) -> Cost:
    """Return the cost of the steps in the log of a training."""
    steps = (Cost(trained_tokens=int(entry["tokens"]), flops=entry.get("flops")) for entry in log)
    return sum(steps, Cost())


def evaluate(products: Products, folder: Path, name: str) -> pd.DataFrame:
    """Return the responses of a policy to the held-out prompts with `kl` and `score/NAME` of each judge.

    Every policy has its own sampling seed. KL is NaN after the first `evaluate.kl_samples` rows.
    """
    params, reference = products.params, products.reference_samples
    prompts, tokenizer = products.prompts(reference), products.tokenizer
    policy, base = (
        load_model(each, **params.engine.loading, frozen=True).to(this_process().device)
        for each in (folder, products.reference)
    )
    seed = int(np.random.SeedSequence([params.seed, zlib.crc32(name.encode())]).generate_state(1)[0])
    sampling = params.sampling(products.limit) | {"seed": seed}
    table = response_table(policy, tokenizer, prompts, **sampling).assign(prompt=reference["prompt"])
    responses = table["ids"].tolist()[: params.evaluate.kl_samples]
    kl = divergence(
        policy, base, prompt_ids(tokenizer, prompts[: len(responses)], sampling["max_prompt_tokens"]), responses,
        params.engine.max_tokens_per_microbatch,
    )  # fmt: skip
    table = table.join(kl[["kl"]])
    scores = products.judged(prompts, table["response"].tolist())
    return table.assign(
        **{f"score/{judge}": values for judge, values in scores.items()},
        **{f"reference_score/{judge}": reference[f"score/{judge}"] for judge in scores},
    )


def best_of_n(products: Products, n: int) -> pd.DataFrame:
    """Return the reference's responses with the expected scores of the best of n of them by the judge that trains.

    The n responses are drawn without replacement from the N responses to a prompt. The i-th smallest is the best
    one with probability C(i - 1, n - 1) / C(N, n). Prompts with fewer than n responses are left out. `kl` is the
    bound log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879).
    """
    table = products.reference_samples.assign(feedback=products.reference_feedback)
    parts = []
    for _, group in table.groupby("prompt", sort=True):
        size = len(group)
        if size < n:
            continue
        ordered = group.sort_values("feedback")
        chance = comb(np.arange(size), n - 1) / comb(size, n)
        part = ordered[["prompt", "ids", "finished"]].assign(kl=np.log(n) - (n - 1) / n)
        for column in ordered.filter(regex="^score/"):
            part[column] = float(chance @ ordered[column])
            part[f"reference_{column}"] = ordered[column]
        parts.append(part)
    return pd.concat(parts)


def metrics(table: pd.DataFrame) -> dict[str, Any]:
    """Return the means over responses. KL is in nats per response."""
    scores = table.filter(regex="score/").mean().to_dict()
    return {
        "responses": len(table),
        "kl_responses": int(table["kl"].notna().sum()),
        "kl": float(table["kl"].mean()),
        "tokens": float(table["ids"].map(len).mean()),
        "unfinished": float(1 - table["finished"].mean()),
        **{str(name): float(value) for name, value in scores.items()},
    }


def by_prompt(table: pd.DataFrame, prompts: list[str]) -> dict[str, Any]:
    """Return counts and sums of each prompt, from which intervals are computed. Prompts without a row have 0."""
    groups = table.groupby("prompt")
    columns = ["kl", *map(str, table.filter(regex="score/").columns)]
    values: dict[str, pd.Series] = {"responses": groups.size(), "kl_responses": groups["kl"].count()}
    values |= {name: groups[name].sum().round(4) for name in columns}
    return {name: each.reindex(prompts, fill_value=0).tolist() for name, each in values.items()}


def device() -> str:
    """Return the name of the GPU, or `CPU`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def peak_gib() -> float:
    """Return the peak memory of the GPU, or the peak resident memory of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
