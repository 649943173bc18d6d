"""Faults of a training: too little memory, non-finite numbers and large gradients."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from dpo.common.errors import InputError
from dpo.training.callbacks import Callback, DivergenceAlarm
from dpo.training.checkpoints import CheckpointStore
from dpo.training.objectives import DpoObjective
from tests.support.training import (
    Steps,
)


def wrap_objective(monkeypatch, wrapper):
    """Replace the objective by `wrapper(loss function, model, batch)`."""
    compute = DpoObjective.__call__

    def wrapped(self, model, batch):
        return wrapper(lambda: compute(self, model, batch), batch)

    monkeypatch.setattr(DpoObjective, "__call__", wrapped)


def limit_memory(monkeypatch, most_rows, when):
    """Fail like the CUDA allocator on micro-batches of more than `most_rows` pairs."""
    backward = torch.Tensor.backward

    def limited(compute, batch):
        exceeded = len(batch.ids) > most_rows
        if exceeded and when == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        loss, sums = compute()
        if exceeded:
            loss.register_hook(lambda grad: grad * 7)  # leave a wrong partial gradient
            backward(loss, retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss, sums

    wrap_objective(monkeypatch, limited)


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("max_tokens_per_microbatch", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_out_of_memory_leads_to_smaller_micro_batches_and_the_same_steps(
    train, monkeypatch, caplog, when, max_tokens_per_microbatch
):
    plain = train(max_tokens_per_microbatch=max_tokens_per_microbatch)
    limit_memory(monkeypatch, 1, when)
    limited = train(max_tokens_per_microbatch=max_tokens_per_microbatch)
    for ours, theirs in zip(limited[0], plain[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, weight in plain[1].items():
        torch.testing.assert_close(limited[1][name], weight, rtol=1e-4, atol=1e-5)
    assert re.search(
        r"step 1: out of memory; from now on each micro-batch is computed in 2 parts, with", caplog.text
    )


def test_too_little_memory_for_one_pair_is_an_input_error(train, monkeypatch):
    limit_memory(monkeypatch, 0, "forward")
    with pytest.raises(InputError, match="not enough memory for one pair; lower it, set gradient_check"):
        train()


def test_other_runtime_errors_are_not_handled_as_out_of_memory(train, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(DpoObjective, "__call__", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train()


def spoil_gradient(monkeypatch, pair):
    """Give micro-batches with `pair` a finite loss with a non-finite gradient."""

    def spoiled(compute, batch):
        loss, sums = compute()
        if pair in batch.ids:
            loss.register_hook(lambda grad: grad * math.inf)
        return loss, sums

    wrap_objective(monkeypatch, spoiled)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_number_stops_training_before_the_step_and_can_be_reproduced(
    train, reference, tmp_path, monkeypatch, where
):
    broken = reference
    if where == "loss":
        broken = reference | {"pair 5": (math.nan, 0.0)}
    else:
        spoil_gradient(monkeypatch, "pair 5")
    with pytest.raises(FloatingPointError, match=r"pair 5\b") as first:
        train(tmp_path, reference=broken, minutes=60)
    count = Steps()
    with pytest.raises(FloatingPointError) as again:
        train(tmp_path, count, reference=broken, minutes=60)
    assert str(again.value) == str(first.value)
    assert count.steps == []
    (file,) = tmp_path.glob("*/non-finite-step-*.json")
    kept = json.loads(file.read_text())
    assert "pair 5" in [row["id"] for row in kept["rows"]]
    assert f"step {kept['step']}: {kept['fault']}" in str(first.value)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_step_changes_no_weight_and_is_logged(
    train, rows, reference, tmp_path, monkeypatch, caplog, where
):
    broken = reference
    if where == "loss":
        broken = reference | {"pair 5": (math.nan, 0.0)}
    else:
        spoil_gradient(monkeypatch, "pair 5")
    weights = {}

    class Watch(Callback):
        def save(self, step):
            weights[step] = torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()

        def on_start(self, resumed_step, history):
            self.save(resumed_step)

        def on_log(self, entry):
            self.save(entry["step"])

    log, final = train(
        tmp_path, Watch(), reference=broken, non_finite="skip", epochs=1, schedule="constant", warmup_ratio=0.0
    )
    skipped = [entry["step"] for entry in log if math.isnan(entry["loss"])]
    assert len(skipped) == 1
    for step in range(1, len(log) + 1):
        assert torch.equal(weights[step], weights[step - 1]) == (step in skipped)
    assert all(weight.isfinite().all() for weight in final.values())
    assert f"step {skipped[0]}: the {where}" in caplog.text
    assert "the step is skipped" in caplog.text
    (file,) = re.findall(r"their tokens are in (\S+);", caplog.text)
    CheckpointStore(tmp_path, 0).discard()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [Path(file)]


def test_an_infinite_loss_with_a_finite_gradient_changes_no_weight(train, monkeypatch):
    def infinite(compute, batch):
        loss, sums = compute()
        return loss + math.inf, sums

    wrap_objective(monkeypatch, infinite)
    weights = []

    class Watch(Callback):
        def on_log(self, entry):
            weights.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone())

    log, _ = train(None, Watch(), non_finite="skip")
    assert all(math.isfinite(entry["grad_norm"]) and math.isnan(entry["loss"]) for entry in log)
    assert all(torch.equal(weight, weights[0]) for weight in weights)


def test_a_gradient_far_above_earlier_ones_raises_an_alarm(train, monkeypatch, caplog):
    done = Steps()

    def large(compute, batch):
        loss, sums = compute()
        return loss * 1e6 if len(done.steps) == 5 else loss, sums

    wrap_objective(monkeypatch, large)
    train(None, done)
    assert re.search(r"step 6: the gradient norm is .* times the median of the steps before", caplog.text)
    assert caplog.text.count("times the median") == 1


def test_a_gradient_is_compared_with_the_last_hundred_steps(caplog):
    history = [{"grad_norm": 1.0}] * 500 + [{"grad_norm": 1000.0}] * 100
    for norm, alarms in ((9000.0, 0), (200_000.0, 1)):
        alarm = DivergenceAlarm()
        alarm.on_start(600, history)
        alarm.on_log({"step": 601, "grad_norm": norm, "loss": 0.7})
        assert caplog.text.count("200 times the median") == alarms


def test_after_steps_without_gradient_any_gradient_is_usual(caplog):
    alarm = DivergenceAlarm()
    for step, norm in enumerate([0.0] * 6 + [1.0], start=1):
        alarm.on_log({"step": step, "grad_norm": norm, "loss": 0.0})
    assert not caplog.records
