"""Stage `reward_model`: train a reward model on the training pairs: `python -m tasks.reward_model SEED`."""

import sys
from dataclasses import asdict
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import PROVENANCE, atomic_write, sha256, write_json
from dpo.config import Params, load_params
from dpo.engine.flops import Cost, cost_of
from dpo.engine.pretrained import load_tokenizer
from dpo.evaluation.bootstrap import bootstrap, mean
from dpo.evaluation.judges import load_judge
from dpo.evaluation.judges.accuracy import judge_accuracy
from dpo.evaluation.settings import RewardModelSettings
from dpo.online.reward_model import train_reward_model
from tasks.common import paths
from tasks.common.memory import check_memory
from tasks.common.runner import run_launched
from tasks.common.usage import Usage
from tasks.tracking.provenance import made_by


def main() -> None:
    """Train one reward model, and save it with its accuracy on held-out pairs."""
    params = load_params()
    seed, usage = seed_argument(params), Usage(f"reward-model-{sys.argv[1]}")
    tokenizer, train = load_tokenizer(paths.REFERENCE), pd.read_parquet(paths.TRAIN)
    check_memory("sft", params, paths.REFERENCE)
    trained = train_reward_model(
        paths.REFERENCE, tokenizer, train, params.reward_model, precision=params.engine.precision, seed=seed
    )
    if not this_process().is_main_process:
        return
    folder = paths.REWARDS / str(seed)
    with atomic_write(folder) as tmp:
        trained.model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        facts = made_by(params, None) | {"reward_model": asdict(params.reward_model), "reward_model_seed": seed}
        write_json(tmp / PROVENANCE, facts | {"weights": sha256(*sorted(tmp.glob("*.safetensors")))})
    config, epochs = trained.model.config, params.reward_model.epochs
    cost = sum((cost_of(trained.rows, config, "trained") for _ in range(epochs)), Cost())
    accuracy = held_out_accuracy(str(folder), tokenizer, seed)
    counts = {"pairs": len(trained.rows) // 2, "prompts": train["prompt"].nunique()}
    facts = {
        "accuracy": accuracy,
        "loss": trained.log[-1]["loss"],
        "cost": counts | asdict(cost) | usage.measured(),
    }
    write_json(paths.reward_metrics(seed), facts)
    from tasks.tracking.runs import log_reward_model  # after the training: MLflow starts slowly

    log_reward_model(params, seed, trained.log, facts)


def seed_argument(params: Params) -> int:
    """Return the stage's only argument, one of the seeds of `sweep.reward_models`."""
    seeds = {str(seed): seed for seed in params.sweep.reward_models}
    if len(sys.argv) != 2 or sys.argv[1] not in seeds:
        given = " ".join(sys.argv[1:])
        raise InputError(
            f"SEED: {given!r} is not in params.yaml: sweep.reward_models; use one of {', '.join(seeds)}"
        )
    return seeds[sys.argv[1]]


def held_out_accuracy(folder: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Any]:
    """Return the accuracy on held-out pairs with its interval, and the mean agreement of people on them."""
    pairs = pd.read_parquet(paths.EVAL)
    judge = load_judge(RewardModelSettings(kind="reward_model", model=folder), "feedback")
    metrics = judge_accuracy([judge], pairs, tokenizer, len(pairs), seed)
    known = pairs["agreement"].astype(float)
    if known.notna().any():
        metrics |= bootstrap({"human_ceiling": mean(known)}, pairs["prompt"].tolist(), seed)
    return metrics


if __name__ == "__main__":
    run_launched(main)
