"""Stage `train`: one cell of the sweep, from the reference to a policy, `python -m tasks.train CELL`."""

from contextlib import nullcontext

import pandas as pd

from dpo.config import load_params
from dpo.files import written_whole
from dpo.loading import load_tokenizer
from dpo.logps import load_model
from dpo.processes import this_process
from dpo.progress import Progress
from dpo.reference import cache_key, load_reference
from dpo.tokens import encode_pairs
from dpo.training import save_checkpoint, train_dpo
from tasks.provenance import made_by
from tasks.stage import (
    REFERENCE_TRAIN,
    SFT,
    TRAIN,
    TRAINING_PROGRESS,
    cell_argument,
    policy_folder,
    run_launched,
    train_log,
)
from tasks.steplog import StepLog
from tasks.tracking import policy_run, tag_checkpoint


def main() -> None:
    """Load, train, save."""
    params = load_params()
    cell = cell_argument(params)
    tokenizer = load_tokenizer(SFT)
    table = pd.read_parquet(TRAIN)
    engine = params.engine
    rows = encode_pairs(table.to_dict("records"), tokenizer, engine.max_length)
    key = cache_key(SFT, tokenizer, rows, engine)
    reference = load_reference(REFERENCE_TRAIN, key)
    model = load_model(SFT, engine.precision, engine.compile)
    progress = Progress(TRAINING_PROGRESS / cell.key, params.run.checkpoint_minutes)
    main_process = this_process().is_main_process
    with policy_run(params, cell, table) if main_process else nullcontext() as run_id:
        log = train_dpo(
            model,
            rows,
            reference,
            params.dpo,
            cell,
            params.losses,
            tokens_per_batch=engine.tokens_per_batch,
            progress=progress,
            callbacks=[StepLog(run_id)] if run_id else [],
        )
        save_checkpoint(model, tokenizer, policy_folder(cell), made_by(params, run_id, cell))
        if run_id:
            tag_checkpoint(run_id, policy_folder(cell))
    if main_process:
        with written_whole(train_log(cell)) as aside:
            pd.DataFrame(log).to_csv(aside, index=False)
        progress.discard()


if __name__ == "__main__":
    run_launched(main)
