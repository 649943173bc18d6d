"""Training of a trial in rounds, for the stages `online` and `rloo`."""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version

import pandas as pd

from dpo.common.distributed import this_process
from dpo.common.files import md5, sha256, write_json
from dpo.common.functions import JUDGE
from dpo.config import Params, load_params
from dpo.engine.logprobs import ENGINE_VERSION
from dpo.engine.pretrained import load_tokenizer
from dpo.evaluation.judges import load_judge
from dpo.evaluation.sampling import response_limit
from dpo.online.rounds import Rounds, drawn_prompts, save_rounds
from dpo.training.checkpoints import CheckpointStore
from dpo.training.settings import Trial
from dpo.training.train import copy_checkpoint
from tasks.common import paths
from tasks.common.memory import check_memory
from tasks.common.runner import check_store, trial_argument
from tasks.common.training_log import write_training_log
from tasks.common.usage import Usage, trained_cost
from tasks.tracking.provenance import made_by
from tasks.tracking.runs import policy_run, tag_checkpoint
from tasks.tracking.steplog import StepLog


def train_in_rounds(method: str, kind: type[Rounds]) -> None:
    """Train the trial of the argument in rounds; save its policy, its rounds, its log and its cost."""
    params = load_params()
    check_store()
    trial = trial_argument(params, of=lambda each: each.method == method)
    feedback = params.judge_of(trial)
    judge, tokenizer = load_judge(feedback, "feedback"), load_tokenizer(paths.REFERENCE)
    train = pd.read_parquet(paths.TRAIN)
    check_memory("train", params, paths.REFERENCE)
    limit = response_limit(params.evaluate.max_new_tokens, train, tokenizer, params.engine.max_length)
    progress = paths.TRAINING_PROGRESS / trial.name
    steps = CheckpointStore(progress / "steps", params.run.checkpoint_minutes)
    main_process, usage = this_process().is_main_process, Usage(trial.name)
    with this_process().main_process_first():
        work = CheckpointStore(progress / "rounds", 0).folder(_key(params, trial))
    rounds = kind(
        paths.REFERENCE, work, judge, trial, params.online, params.dpo, params.engine, params.validate,
        params.sampling(limit), paths.BENCHMARKS, steps,
    )  # fmt: skip
    with policy_run(params, trial) if main_process else nullcontext() as run_id:
        prompts = drawn_prompts(train, params.online, trial.seed)
        outcome = rounds.run(prompts, [StepLog(run_id), usage] if run_id else [])
        facts = made_by(params, run_id, trial) | {"feedback": asdict(feedback)}
        if main_process:
            copy_checkpoint(outcome.policy, paths.policy_folder(trial), facts, params.hub_reference)
        if run_id:
            tag_checkpoint(run_id, paths.policy_folder(trial))
    if main_process:
        save_rounds(work, paths.rounds_folder(trial))
        summary = {f"round-{number}": each for number, each in enumerate(outcome.counts, 1)}
        write_json(paths.rounds_summary(trial), summary)
        write_training_log(paths.train_log(trial), outcome.log)
        counts = {
            name: sum(each.get(key, 0) for each in outcome.counts)
            for name, key in (("pairs", "pairs"), ("prompts", "prompts"), ("judged_answers", "answers"))
        }
        usage.write(paths.cost(trial), outcome.cost + trained_cost(outcome.log), counts)
        steps.discard()
        CheckpointStore(progress / "rounds", 0).discard()
        CheckpointStore(progress, 0).discard()


def _key(params: Params, trial: Trial) -> str:
    """Return the hash of everything that the rounds depend on, so that a run never resumes another one."""
    groups = (params.engine, params.dpo, params.online, params.feedback, params.validate)
    facts = {
        "settings": [group and asdict(group) for group in groups],
        "trial": trial.settings,
        "functions": [trial.loss.source, JUDGE.digest(getattr(params.feedback, "function", ""))],
        "max_new_tokens": params.evaluate.max_new_tokens,
        "engine": ENGINE_VERSION,
        "packages": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "train": md5(paths.TRAIN),
        "reference": sha256(*sorted(paths.REFERENCE.glob("*.safetensors"))),
        "reward_models": sha256(*sorted(paths.REWARDS.rglob("*.safetensors"))),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
