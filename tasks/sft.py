"""Stage `sft`: fine-tune the base model on the completions; the result is the reference policy.

With `sft: null`, the base model is the reference.
"""

import shutil
from contextlib import nullcontext

import pandas as pd

from dpo.common.distributed import this_process
from dpo.common.files import PROVENANCE, atomic_write, link_tree, write_json
from dpo.config import Params, load_params
from dpo.engine.flops import Cost
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_config, load_tokenizer
from dpo.engine.token_table import open_table
from dpo.training.checkpoints import CheckpointStore
from dpo.training.routers import check_routers
from dpo.training.settings import SftSettings
from dpo.training.train import save_checkpoint, save_merged, train_sft
from tasks.common.memory import check_memory, mean_pair
from tasks.common.paths import (
    BASE,
    DEMONSTRATIONS,
    METRICS,
    REFERENCE,
    REFERENCE_COST,
    TOKENS_DEMONSTRATIONS,
    TOKENS_TRAIN,
    TRAIN,
    TRAINING_PROGRESS,
)
from tasks.common.runner import check_store, run_launched
from tasks.common.training_log import write_training_log
from tasks.common.usage import Usage, trained_cost
from tasks.tracking.provenance import made_by, weights
from tasks.tracking.runs import reference_run, tag_checkpoint
from tasks.tracking.steplog import StepLog

ADAPTER = TRAINING_PROGRESS / "sft-adapter"


def main() -> None:
    """Save the reference policy: the base model, fine-tuned unless `sft` is null."""
    params = load_params()
    if params.dpo.router_aux_loss or (params.sft and params.sft.router_aux_loss):
        check_routers(load_config(BASE))
    if params.sft is not None:
        fine_tune(params, params.sft)
    elif this_process().is_main_process:
        link_base(params)


def link_base(params: Params) -> None:
    """Make the base model the reference. Its files are hard links to those of the base, or copies."""
    with atomic_write(REFERENCE) as tmp:
        link_tree(BASE, tmp)
        write_json(tmp / PROVENANCE, {**made_by(params, None), "weights": weights(tmp)})
    with atomic_write(METRICS / "sft.csv") as tmp:
        tmp.write_text("step,loss\n")
    Usage("sft").write(REFERENCE_COST, Cost(), {})


def fine_tune(params: Params, sft: SftSettings) -> None:
    """Fine-tune the base model on completions and save it as the reference. Adapters are merged into it."""
    check_store()
    engine, tokenizer = params.engine, load_tokenizer(BASE)
    folder, table = (TOKENS_DEMONSTRATIONS, DEMONSTRATIONS) if sft.source else (TOKENS_TRAIN, TRAIN)
    rows = open_table(folder, table, tokenizer, engine.max_length)
    if sft.max_pairs is not None:
        places = pd.RangeIndex(len(rows)).to_series()
        rows = rows.select(places.sample(min(sft.max_pairs, len(rows)), random_state=params.seed).to_numpy())
    if sft.completions == "chosen":
        rows = rows.select([place for place, each in enumerate(rows.ids) if rows.labels.get(each, 1)])
    if sft.completions == "chosen" or rows.labels:  # the second completion of a labelled row is of another prompt
        rows = rows.first_completions(1)
    check_memory("sft", params, BASE, mean_pair(rows))
    model = (
        load_model(BASE, **engine.loading, frozen="base")
        if sft.lora
        else load_model(BASE, engine.precision, engine.compile)
    )
    store = CheckpointStore(TRAINING_PROGRESS / "sft", params.run.checkpoint_minutes)
    main_process, usage = this_process().is_main_process, Usage("sft")
    with reference_run(params, table) if main_process else nullcontext() as run_id:
        log = train_sft(
            model, rows, sft, seed=params.seed, store=store,
            max_tokens_per_microbatch=engine.max_tokens_per_microbatch,
            callbacks=[StepLog(run_id), usage] if run_id else [],
        )  # fmt: skip
        facts = made_by(params, run_id)
        save_checkpoint(model, tokenizer, ADAPTER if sft.lora else REFERENCE, facts)
        if main_process and sft.lora:
            save_merged(ADAPTER, REFERENCE, facts)
            shutil.rmtree(ADAPTER)
        if run_id:
            tag_checkpoint(run_id, REFERENCE)
    if main_process:
        write_training_log(METRICS / "sft.csv", log)
        usage.write(REFERENCE_COST, trained_cost(log), {"pairs": len(rows)})
        store.discard()


if __name__ == "__main__":
    run_launched(main)
