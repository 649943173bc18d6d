"""Training with each loss, with weights of pairs, and with agreement as label smoothing."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model
from dpo.engine.token_table import TokenTable
from dpo.training.losses import Conservative, LdDpo, PairBatch, Robust, Sigmoid, Wpo, check_agreement
from dpo.training.losses.base import WITH_REFERENCE
from dpo.training.settings import EarlyStopSettings
from dpo.training.train import _hold_out, train_dpo
from tests.support.training import (
    LOSSES,
    Centered,
    dpo_params,
    every_loss,
    run_dpo,
    steps_of,
    trial,
)


def test_a_loss_with_step_wide_statistics_does_not_depend_on_micro_batches(tiny_model_dir, rows, reference):
    seen = []

    class Recorded(Centered):
        def statistics(self, step, beta):
            seen.append(len(step.policy))
            return super().statistics(step, beta)

    early_stop = EarlyStopSettings(validation_share=0.3, every_steps=1, patience=9)
    changes = {"loss": Recorded(), "learning_rate": 1e-4, "early_stop": early_stop}
    expected, expected_weights = run_dpo(tiny_model_dir, rows, reference, **changes)
    training, validation = (len(part) for part in _hold_out(TokenTable.of(rows), 0.3))
    sizes = [size for step in range(0, training, 4) for size in (min(4, training - step), validation)]
    assert seen == sizes
    for max_tokens_per_microbatch in (160, 1):
        log, weights = run_dpo(
            tiny_model_dir, rows, reference, max_tokens_per_microbatch=max_tokens_per_microbatch, **changes
        )
        for name in ("loss", "grad_norm", "eval_loss"):
            assert [e[name] for e in log] == pytest.approx([e[name] for e in expected], rel=1e-4, abs=1e-4), name
        for name, weight in expected_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5)
    assert seen == sizes * 3


def test_a_loss_gets_log_probs_per_token_if_it_needs_them(tiny_model_dir, rows, reference):
    class PerToken(Sigmoid):
        needs = WITH_REFERENCE | {"token_logps"}

        def _forward(self, pairs, beta):
            parts = pairs.token_logps.split(pairs.lengths.flatten().tolist())
            policy = torch.stack([part.sum() for part in parts]).view(-1, 2)
            return super()._forward(PairBatch(policy, pairs.reference, pairs.lengths), beta)

    expected, _ = run_dpo(tiny_model_dir, rows, reference, 100)
    log, _ = run_dpo(tiny_model_dir, rows, reference, 100, loss=PerToken())
    for ours, theirs in zip(log, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_a_loss_without_reference_trains_without_reference_log_probs(tiny_model_dir, rows, reference):
    class NoReference(Sigmoid):
        needs = frozenset()

    log, _ = run_dpo(tiny_model_dir, rows, {}, loss=NoReference(), pairs_per_step=18, beta=0.5)
    logps = torch.tensor([reference[row.id] for row in rows])
    expected = Sigmoid()(PairBatch(logps, torch.zeros(18, 2), torch.ones(18, 2)), 0.5).mean().item()
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert log[0]["rewards/chosen"] == pytest.approx(0.5 * log[0]["logps/chosen"])
    assert not {"logratios/chosen", "logratios/rejected"} & log[0].keys()


AVERAGED = {"length_normalised", "simpo", "orpo", "sft"}
"""Losses whose implicit rewards are averaged over tokens."""


@pytest.mark.parametrize("loss", every_loss())
def test_every_loss_raises_the_margin(tiny_model_dir, rows, reference, loss):
    log, _ = run_dpo(tiny_model_dir, rows, reference, loss=loss, learning_rate=3e-3, epochs=3)
    if "reference" in LOSSES[loss].needs:
        assert log[0]["rewards/margins"] == 0.0
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 0.05 * (0.1 if loss in AVERAGED else 1)
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("loss", every_loss())
def test_no_loss_depends_on_micro_batches(tiny_model_dir, rows, reference, loss):
    changes = {"loss": loss, "learning_rate": 1e-4, "epochs": 2}
    expected, expected_weights = run_dpo(tiny_model_dir, rows, reference, **changes)
    log, weights = run_dpo(tiny_model_dir, rows, reference, max_tokens_per_microbatch=1, **changes)
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert [e[name] for e in log] == pytest.approx([e[name] for e in expected], rel=1e-3, abs=1e-4), name
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5)


def test_the_weight_of_a_pair_multiplies_its_loss(tiny_model_dir, rows, reference):
    weights = {row.id: 0.25 * i for i, row in enumerate(rows[:9], 1)}
    shifted = {name: (chosen - 3, rejected) for name, (chosen, rejected) in reference.items()}
    loss = math.log1p(math.exp(-0.3))
    for max_tokens_per_microbatch in (60, 10_000):
        log = train_dpo(
            load_model(tiny_model_dir), rows, shifted, dpo_params(), trial(learning_rate=1e-12), weights=weights,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
        )  # fmt: skip
        expected = [loss * sum(weights.get(r.id, 1) for r in step) / len(step) for step in steps_of(rows, 3)]
        assert [entry["loss"] for entry in log] == pytest.approx(expected, rel=1e-5)


def test_weights_of_one_change_nothing(tiny_model_dir, rows, reference):
    plain, weights = run_dpo(tiny_model_dir, rows, reference)
    model = load_model(tiny_model_dir)
    ones = {row.id: 1.0 for row in rows}
    log = train_dpo(
        model, rows, reference, dpo_params(), trial(), weights=ones, max_tokens_per_microbatch=10_000
    )  # fmt: skip
    assert log == plain
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.state_dict().items())


def test_label_smoothing_can_be_the_agreement_of_each_pair(tiny_model_dir, rows, reference):
    agreement = {row.id: 0.5 + i / 20 for i, row in enumerate(rows[:9])}
    shifted = {name: (chosen - 30, rejected) for name, (chosen, rejected) in reference.items()}
    log = train_dpo(
        load_model(tiny_model_dir), rows, shifted, dpo_params(), max_tokens_per_microbatch=60, agreement=agreement,
        trial=trial(learning_rate=1e-12, loss=Conservative(label_smoothing="agreement")),
    )  # fmt: skip
    right, wrong = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    expected = []
    for step in steps_of(rows, 3):
        shares = [agreement.get(row.id, 1.0) for row in step]
        expected.append(sum(share * right + (1 - share) * wrong for share in shares) / len(step))
    assert [entry["loss"] for entry in log] == pytest.approx(expected, rel=1e-4)


def test_label_smoothing_by_agreement_without_any_is_an_input_error(tiny_model_dir, rows, reference):
    for loss in (Conservative(label_smoothing="agreement"), Robust(label_smoothing="agreement")):
        with pytest.raises(
            InputError, match=rf"losses\.{loss.name}\.label_smoothing: agreement: no pair has an agreement"
        ):
            run_dpo(tiny_model_dir, rows, reference, loss=loss)


def test_robust_needs_a_majority_for_chosen():
    check_agreement([Conservative(label_smoothing="agreement"), Robust(), Sigmoid()], {"a": 0.5, "b": 0.0})
    check_agreement([Robust(label_smoothing="agreement")], {"a": 0.51, "b": 1.0})
    with pytest.raises(
        InputError, match=r"robust needs agreements above 0\.5, but those of 2 pairs .* 0\.5 of 'b'"
    ):
        check_agreement([Robust(label_smoothing="agreement")], {"a": 0.51, "b": 0.5, "c": 0.2})


def test_values_per_token_are_those_of_the_plain_model(tiny_model_dir, rows, reference):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    weights = []
    for row in rows:
        weight = 0.0
        for completion in row.completions:
            logits = plain(input_ids=torch.tensor([row.prompt + completion])).logits[0, len(row.prompt) - 1 : -1]
            table = logits.detach().double().log_softmax(1)
            logps = table.gather(1, torch.tensor(completion)[:, None])[:, 0]
            weight += (logps - table.exp().square().sum(1).log()).mean().item()
        weights.append(math.exp(weight))
    change = {"pairs_per_step": 18, "learning_rate": 1e-12}
    log, _ = run_dpo(tiny_model_dir, rows, reference, loss=Wpo(), **change)
    assert log[0]["loss"] == pytest.approx(math.log(2) * sum(weights) / 18, rel=1e-4)
    log, _ = run_dpo(tiny_model_dir, rows, reference, loss=LdDpo(alpha=0.0), **change)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the reference is the model before training"
