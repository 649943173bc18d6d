"""Stage `sft`: fine-tune the base model on the completions; the result is the reference policy."""

import dataclasses
from contextlib import nullcontext

import pandas as pd

from dpo.common.distributed import this_process
from dpo.common.files import atomic_write
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.tokenization import encode_pairs
from dpo.training.checkpoints import CheckpointStore
from dpo.training.train import save_checkpoint, train_sft
from tasks.common.paths import BASE, METRICS, REFERENCE, TRAIN, TRAINING_PROGRESS
from tasks.common.runner import run_launched
from tasks.tracking.provenance import made_by
from tasks.tracking.runs import reference_run, tag_checkpoint
from tasks.tracking.steplog import StepLog


def main() -> None:
    """Fine-tune the base model and save the reference policy."""
    params = load_params()
    tokenizer = load_tokenizer(BASE)
    table = pd.read_parquet(TRAIN)
    if params.sft.max_pairs is not None:
        table = table.sample(min(params.sft.max_pairs, len(table)), random_state=params.seed)
    rows = encode_pairs(table.to_dict("records"), tokenizer, params.engine.max_length)
    if params.sft.completions == "chosen":
        rows = [dataclasses.replace(row, completions=row.completions[:1], context=row.context[:1]) for row in rows]
    model = load_model(BASE, params.engine.precision, params.engine.compile)
    store = CheckpointStore(TRAINING_PROGRESS / "sft", params.run.checkpoint_minutes)
    main_process = this_process().is_main_process
    with reference_run(params, table) if main_process else nullcontext() as run_id:
        log = train_sft(
            model, rows, params.sft, seed=params.seed, store=store,
            max_tokens_per_microbatch=params.engine.max_tokens_per_microbatch,
            callbacks=[StepLog(run_id)] if run_id else [],
        )  # fmt: skip
        save_checkpoint(model, tokenizer, REFERENCE, made_by(params, run_id))
        if run_id:
            tag_checkpoint(run_id, REFERENCE)
    if main_process:
        with atomic_write(METRICS / "sft.csv") as tmp:
            pd.DataFrame(log).to_csv(tmp, index=False)
        store.discard()


if __name__ == "__main__":
    run_launched(main)
