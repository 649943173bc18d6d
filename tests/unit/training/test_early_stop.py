"""Early stopping: validation pairs, patience and the best weights."""

import dataclasses

import pytest
import torch

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.token_table import TokenTable
from dpo.engine.tokenization import TokenRow
from dpo.training.losses import PairBatch, Sigmoid
from dpo.training.settings import EarlyStopSettings
from dpo.training.train import _hold_out, train_dpo
from tests.support.training import (
    dpo_params,
    run_dpo,
    trial,
)


def test_early_stop_ends_after_its_patience_and_keeps_the_best_weights(tiny_model_dir, rows, reference):
    # Validation pairs prefer the other completion, so training increases their loss from the first step on.
    _, held_out = _hold_out(TokenTable.of(rows), 0.3)
    flipped = {row.id: dataclasses.replace(row, completions=row.completions[::-1]) for row in held_out}
    rows = [flipped.get(row.id, row) for row in rows]
    reference = {key: value[::-1] if key in flipped else value for key, value in reference.items()}
    early_stop = EarlyStopSettings(validation_share=0.3, every_steps=1, patience=2)
    model = load_model(tiny_model_dir)
    params = dpo_params(early_stop=early_stop, epochs=9)
    log = train_dpo(model, rows, reference, params, trial(), max_tokens_per_microbatch=500)
    validation = [entry["eval_loss"] for entry in log]
    assert validation == sorted(validation)
    assert len(log) == 1 + 2
    policy = sequence_logps(model, list(flipped.values()), 500)
    cached = torch.tensor([reference[name] for name in flipped])
    losses = Sigmoid()(PairBatch(policy, cached, torch.ones_like(policy)), 0.1)
    assert losses.mean().item() == pytest.approx(validation[0], rel=1e-6)
    assert validation[1] > validation[0] * 1.001


def test_early_stop_without_validation_pairs_is_an_input_error(tiny_model_dir, rows, reference):
    early_stop = EarlyStopSettings(validation_share=1e-6, every_steps=1, patience=1)
    with pytest.raises(InputError, match=r"validation_share 1e-06 of 18 pairs leaves no pairs to validate on"):
        run_dpo(tiny_model_dir, rows, reference, early_stop=early_stop)


def test_validation_pairs_share_no_prompt_with_training_pairs():
    rows = [TokenRow(str(i), (i % 20,), ((1,), (2,))) for i in range(200)]
    kept, held_out = (
        [rows[int(name)].prompt for name in part.ids] for part in _hold_out(TokenTable.of(rows), 0.3)
    )
    assert len(kept) + len(held_out) == 200
    assert not set(kept) & set(held_out)
