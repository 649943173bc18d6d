"""Stage `train`: train the policy of one trial from the reference: `python -m tasks.train TRIAL`."""

from collections.abc import Mapping
from contextlib import nullcontext

import pandas as pd

from dpo.common.distributed import this_process
from dpo.config import load_params
from dpo.engine.flops import Cost, cost_of
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import cache_key, load_reference
from dpo.engine.token_table import open_table
from dpo.training.checkpoints import CheckpointStore
from dpo.training.losses import check_rows
from dpo.training.train import save_checkpoint, train_dpo
from tasks.common.memory import check_memory, mean_pair
from tasks.common.paths import (
    REFERENCE,
    REFERENCE_TRAIN,
    TOKENS_TRAIN,
    TRAIN,
    TRAINING_PROGRESS,
    cost,
    policy_folder,
    train_log,
)
from tasks.common.runner import check_store, run_launched, trial_argument
from tasks.common.training_log import write_training_log
from tasks.common.usage import Usage, trained_cost
from tasks.tracking.provenance import made_by
from tasks.tracking.runs import policy_run, tag_checkpoint
from tasks.tracking.steplog import StepLog


def main() -> None:
    """Train one trial and save its policy."""
    params = load_params()
    check_store()
    trial, engine = trial_argument(params, of=lambda each: each.rounds is None), params.engine
    tokenizer = load_tokenizer(REFERENCE)
    rows = open_table(TOKENS_TRAIN, TRAIN, tokenizer, engine.max_length)
    check_rows([trial.loss], labelled=bool(rows.labels))
    reference: Mapping[str, tuple[float, float]] = {}
    if "reference" in trial.loss.needs:
        reference = load_reference(REFERENCE_TRAIN, cache_key(REFERENCE, tokenizer, rows, engine))
    table = pd.read_parquet(TRAIN, columns=["id", "prompt", "weight", "agreement"])
    check_memory("train", params, REFERENCE, mean_pair(rows))
    model = load_model(REFERENCE, **engine.loading, frozen="base" if params.trains_adapter else False)
    store = CheckpointStore(TRAINING_PROGRESS / trial.name, params.run.checkpoint_minutes)
    main_process, usage = this_process().is_main_process, Usage(trial.name)
    with policy_run(params, trial) if main_process else nullcontext() as run_id:
        log = train_dpo(
            model, rows, reference, params.dpo, trial, store=store,
            max_tokens_per_microbatch=engine.max_tokens_per_microbatch,
            weights=_known(table, "weight"), agreement=_known(table, "agreement"),
            callbacks=[StepLog(run_id), usage] if run_id else [],
        )  # fmt: skip
        facts = made_by(params, run_id, trial)
        save_checkpoint(model, tokenizer, policy_folder(trial), facts, params.hub_reference)
        if run_id:
            tag_checkpoint(run_id, policy_folder(trial))
    if main_process:
        write_training_log(train_log(trial), log)
        scored = cost_of(rows, model.model.config, "scored") if reference else Cost()
        counts = {"pairs": len(rows), "prompts": table["prompt"].nunique()}
        usage.write(cost(trial), scored + trained_cost(log), counts)
        store.discard()


def _known(table: pd.DataFrame, column: str) -> dict[str, float]:
    """Return the values of a column by the id of the pair, without those that are null."""
    known = table[table[column].notna()]
    return dict(zip(known["id"].tolist(), known[column].tolist(), strict=True))


if __name__ == "__main__":
    run_launched(main)
