"""Stage `sft`: fine-tune the base model on the completions; the result is the reference policy."""

import dataclasses
from contextlib import nullcontext

import pandas as pd

from dpo.config import load_params
from dpo.files import written_whole
from dpo.loading import load_tokenizer
from dpo.logps import load_model
from dpo.processes import this_process
from dpo.progress import Progress
from dpo.tokens import encode_pairs
from dpo.training import save_checkpoint, train_sft
from tasks.provenance import made_by
from tasks.stage import BASE, METRICS, SFT, TRAIN, TRAINING_PROGRESS, run_launched
from tasks.steplog import StepLog
from tasks.tracking import reference_run, tag_checkpoint


def main() -> None:
    """Load, train, save."""
    params = load_params()
    tokenizer = load_tokenizer(BASE)
    table = pd.read_parquet(TRAIN)
    if params.sft.max_pairs is not None:
        table = table.sample(min(params.sft.max_pairs, len(table)), random_state=params.seed)
    rows = encode_pairs(table.to_dict("records"), tokenizer, params.engine.max_length)
    if params.sft.completions == "chosen":
        rows = [dataclasses.replace(row, completions=row.completions[:1]) for row in rows]
    model = load_model(BASE, params.engine.precision, params.engine.compile)
    progress = Progress(TRAINING_PROGRESS / "sft", params.run.checkpoint_minutes)
    main_process = this_process().is_main_process
    with reference_run(params, table) if main_process else nullcontext() as run_id:
        log = train_sft(
            model,
            rows,
            params.sft,
            tokens_per_batch=params.engine.tokens_per_batch,
            seed=params.seed,
            progress=progress,
            callbacks=[StepLog(run_id)] if run_id else [],
        )
        save_checkpoint(model, tokenizer, SFT, made_by(params, run_id))
        if run_id:
            tag_checkpoint(run_id, SFT)
    if main_process:
        with written_whole(METRICS / "sft.csv") as aside:
            pd.DataFrame(log).to_csv(aside, index=False)
        progress.discard()


if __name__ == "__main__":
    run_launched(main)
