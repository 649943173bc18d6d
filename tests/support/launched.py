"""Train on tiny data, for tests that start several processes: `launched.py MODEL OUT SETTINGS`."""

import json
import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer

from dpo.engine.logprobs import load_model
from dpo.training.callbacks import Callback
from dpo.training.checkpoints import CheckpointStore
from dpo.training.settings import EarlyStopSettings
from dpo.training.train import save_checkpoint, train_dpo
from tests.support.training import (
    ALL_LOSSES,
    LORA,
    Centered,
    dpo_params,
    make_reference,
    make_rows,
    rows_of,
    trial,
)


def require_reduced_gradients() -> None:
    """Fail if a process accumulates the gradients of the whole model."""

    def check(self, requires_gradient_sync, **kwargs):
        assert requires_gradient_sync, "FSDP does not reduce the gradients of this micro-batch"

    FSDPModule.set_requires_gradient_sync = check


class Exit(Callback):
    def on_log(self, entry):
        if entry["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def main(model_folder, out, settings):
    if settings.pop("every_loss", False):
        for name in ALL_LOSSES:
            run(model_folder, out / name, {**settings, "loss": name})
    else:
        run(model_folder, out, settings)


def run(model_folder, out, settings):
    if settings.pop("sharded", False):
        require_reduced_gradients()
    callbacks = [Exit()] if settings.pop("interrupted", False) else []
    loss, rate = settings.pop("loss", "sigmoid"), settings.pop("learning_rate", 1e-3)
    if settings.pop("lora", False):
        settings["lora"] = LORA
    if settings.pop("stopped_early", False):
        settings["early_stop"] = EarlyStopSettings(validation_share=0.4, every_steps=1, patience=1)
    precision = settings.pop("precision", "fp32")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = rows_of(loss, make_rows(model_folder, 16))
    loss = Centered() if loss == "centered" else loss
    reference = make_reference(model_folder, rows)
    model = load_model(model_folder, precision, frozen="base" if "lora" in settings else False)
    log = train_dpo(
        model, rows, reference, dpo_params(pairs_per_step=5, **settings), trial(loss=loss, learning_rate=rate),
        max_tokens_per_microbatch=100, store=CheckpointStore(out.with_suffix(".store"), 0), callbacks=callbacks,
    )  # fmt: skip
    save_checkpoint(model, tokenizer, out, {})
    if PartialState().is_main_process:
        out.with_suffix(".json").write_text(json.dumps([PartialState().num_processes, log]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
