"""Token rows of the tiny model, their reference log-probs, and trainings of them."""

import pytest

from dpo.engine.logprobs import load_model
from dpo.training.checkpoints import CheckpointStore
from dpo.training.train import train_dpo
from tests.support.training import (
    dpo_params,
    make_reference,
    make_rows,
    trial,
)


@pytest.fixture(scope="module")
def rows(tiny_model_dir):
    return make_rows(tiny_model_dir, 18)


@pytest.fixture(scope="module")
def reference(tiny_model_dir, rows):
    return make_reference(tiny_model_dir, rows)


@pytest.fixture(scope="module")
def train(tiny_model_dir, rows, reference):
    """Train two epochs of three steps, the last of each short; return the log and the weights."""

    def run(
        root=None, *callbacks, max_tokens_per_microbatch=300, rows=rows, reference=reference, minutes=0,
        learning_rate=1e-3, loss="sigmoid", **changes,
    ):  # fmt: skip
        model = load_model(tiny_model_dir)
        params = dpo_params(
            **{"epochs": 2, "pairs_per_step": 7, "schedule": "cosine", "warmup_ratio": 0.3, **changes}
        )
        for callback in callbacks:
            callback.model = model
        store = None if root is None else CheckpointStore(root, minutes)
        log = train_dpo(
            model, rows, reference, params, trial(learning_rate=learning_rate, loss=loss),
            max_tokens_per_microbatch=max_tokens_per_microbatch, store=store, callbacks=callbacks,
        )  # fmt: skip
        return log, {name: weight.detach().clone() for name, weight in model.model.state_dict().items()}

    return run
