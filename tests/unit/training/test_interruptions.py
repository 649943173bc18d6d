"""Training that is interrupted, runs out of memory or disk, or meets a non-finite number."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dpo.common.errors import InputError, Stopped
from dpo.engine.logprobs import load_model
from dpo.training.callbacks import Callback, DivergenceAlarm
from dpo.training.checkpoints import CheckpointStore, last_checkpoint
from dpo.training.losses import Custom
from dpo.training.objectives import DpoObjective
from dpo.training.settings import EarlyStopSettings
from dpo.training.train import train_dpo, train_sft
from tests.support.training import (
    ALL_LOSSES,
    LORA,
    Killed,
    dpo_params,
    every_loss,
    make_reference,
    rows_of,
    sft_params,
    trial,
)

EARLY_STOP = EarlyStopSettings(validation_share=0.3, every_steps=1, patience=2)


class KillAfter(Callback):
    """Kills training in the step after `step`, before that step has a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_log(self, entry):
        if entry["step"] == self.step + 1:
            raise Killed


class TerminateAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_log(self, entry):
        if entry["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Steps(Callback):
    def __init__(self):
        self.steps = []

    def on_log(self, entry):
        if "loss" in entry:
            self.steps.append(entry["step"])


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


@pytest.fixture(scope="module")
def uninterrupted(train):
    return train()


@pytest.fixture(scope="module")
def killed(train, tmp_path_factory):
    """The folder of a run that was killed in its fifth step."""
    root = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        train(root, KillAfter(4))
    return root


@pytest.fixture
def root(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "progress")


def assert_same(one, other):
    assert [list(entry.items()) for entry in one[0]] == [list(entry.items()) for entry in other[0]]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "rmsprop"}, {"lora": LORA}, {"early_stop": EARLY_STOP}, {"gradient_checkpointing": True}],
    ids=["adamw", "rmsprop", "lora", "early_stop", "gradient_checkpointing"],
)
def test_training_killed_twice_ends_with_the_same_log_and_the_same_bits(train, tmp_path, changes):
    uninterrupted = train(**changes)
    kills = (3, 5) if len(uninterrupted[0]) == 6 else (2,)
    for kill in kills:
        with pytest.raises(Killed):
            train(tmp_path, KillAfter(kill), **changes)
    count = Steps()
    assert_same(train(tmp_path, count, **changes), uninterrupted)
    assert count.steps[0] == kills[-1] + 1


@pytest.mark.parametrize("loss", every_loss(name for name in ALL_LOSSES if name != "sigmoid"))
@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), LORA], ids=["full", "lora"])
def test_training_with_every_loss_resumes_to_the_same_bits(train, rows, tiny_model_dir, tmp_path, loss, lora):
    rows = rows_of(loss, rows)
    settings = {"loss": loss, "lora": lora, "rows": rows, "reference": make_reference(tiny_model_dir, rows)}
    with pytest.raises(Killed):
        train(tmp_path, KillAfter(4), **settings)
    assert_same(train(tmp_path, **settings), train(**settings))


def test_a_change_of_the_code_of_a_loss_starts_training_again(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "functions/losses/mine_resumed.py"
    code.parent.mkdir(parents=True)
    code.write_text("def loss(pairs, beta):\n    return -beta * (pairs.policy[:, 0] - pairs.policy[:, 1])\n")
    loss = Custom(function="functions.losses.mine_resumed:loss")
    for first in (1, 5, 1):
        count = Steps()
        with pytest.raises(Killed):
            train(tmp_path / "progress", count, KillAfter(4 if first == 1 else 5), loss=loss)
        assert count.steps[0] == first
        if first == 5:
            (code.parent / "words.txt").write_text("a file that the loss may read")


def test_sft_resumes_too(tiny_model_dir, rows, tmp_path):
    def run(*callbacks, store=None):
        model = load_model(tiny_model_dir)
        log = train_sft(
            model,
            rows,
            sft_params(),
            max_tokens_per_microbatch=200,
            seed=3,
            store=store,
            callbacks=callbacks,
        )
        return log, model.model.state_dict()

    store = CheckpointStore(tmp_path, 0)
    with pytest.raises(Killed):
        run(KillAfter(3), store=store)
    count = Steps()
    assert_same(run(count, store=store), run())
    assert count.steps == [4, 5]


def test_the_last_two_checkpoints_are_kept_even_if_the_clock_is_set_back(train, tmp_path):
    class ClockSetBack(Callback):
        def on_log(self, entry):
            for path in tmp_path.glob(f"*/checkpoint-{entry['step'] - 1}"):
                os.utime(path, (1e9 - 1e6 * entry["step"],) * 2)

    with pytest.raises(Killed):
        train(tmp_path, ClockSetBack(), KillAfter(4))
    assert sorted(path.name for path in tmp_path.glob("*/checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_checkpoints_are_written_at_intervals(train, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dpo.training.loop.time.monotonic", lambda: now[0])

    class MinutePerStep(Callback):
        def on_log(self, entry):
            now[0] += 60.0

    train(tmp_path, MinutePerStep(), minutes=2)
    # The last two are kept: none of the steps 3 and 5.
    assert sorted(path.name for path in tmp_path.glob("*/checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no checksums", "empty checksums"])
@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt", "history.json"])
def test_a_damaged_checkpoint_is_removed_and_the_one_before_it_is_used(root, caplog, file, damage):
    newest = next(root.glob("*/checkpoint-4"))
    data = bytearray((newest / file).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (newest / file).write_bytes(data)
    elif damage == "truncate":
        (newest / file).write_bytes(data[:-7])
    elif damage == "remove":
        (newest / file).unlink()
    elif damage == "no checksums":
        (newest / "sha256.json").unlink()
    else:
        (newest / "sha256.json").write_text("")
    assert last_checkpoint(newest.parent).name == "checkpoint-3"
    assert not newest.exists()
    fault = f"damaged: {file}" if damage in ("flip", "truncate") else "incomplete"
    assert re.search(rf"checkpoint-4: {re.escape(fault)}.*training uses the checkpoint before it", caplog.text)


def test_training_resumes_from_the_checkpoint_before_a_damaged_one(train, uninterrupted, root):
    next(root.glob("*/checkpoint-4/optimizer.pt")).write_bytes(b"")
    count = Steps()
    assert_same(train(root, count), uninterrupted)
    assert count.steps == [4, 5, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 2.0},
        {"epochs": 3},
        {"max_tokens_per_microbatch": 310},
        {"rows": "fewer"},
        {"reference": "moved"},
    ],
)
def test_a_run_with_other_settings_or_data_does_not_resume_from_this_checkpoint(
    train, rows, reference, root, changes
):
    if "rows" in changes:
        changes = {"rows": rows[:-1]}
    if "reference" in changes:
        changes = {"reference": reference | {"pair 3": (reference["pair 3"][0] + 1e-6, reference["pair 3"][1])}}
    count = Steps()
    with pytest.raises(Killed):
        train(root, count, KillAfter(0), **changes)
    assert count.steps == [1]


def test_a_run_with_another_precision_does_not_resume_from_this_checkpoint(tiny_model_dir, rows, tmp_path):
    def sft(precision, *callbacks):
        model = load_model(tiny_model_dir, precision)
        train_sft(
            model,
            rows,
            sft_params(),
            max_tokens_per_microbatch=300,
            seed=3,
            store=CheckpointStore(tmp_path, 0),
            callbacks=callbacks,
        )

    with pytest.raises(Killed):
        sft("fp32", KillAfter(2))
    count = Steps()
    sft("bf16", count)
    assert count.steps[0] == 1


def test_training_killed_after_early_stopping_stops_at_the_same_step_again(train, tmp_path):
    class KillAtEnd(Callback):
        def on_end(self):
            raise Killed

    stop = {"early_stop": EarlyStopSettings(validation_share=0.3, every_steps=1, patience=1), "epochs": 9}
    expected = train(learning_rate=0.5, **stop)
    assert len(expected[0]) < 18
    with pytest.raises(Killed):
        train(tmp_path, KillAtEnd(), learning_rate=0.5, **stop)
    assert_same(train(tmp_path, learning_rate=0.5, **stop), expected)


@pytest.mark.parametrize("minutes", [60, 0], ids=["without a checkpoint", "right after one"])
def test_sigterm_saves_a_checkpoint_and_the_next_run_resumes(train, uninterrupted, tmp_path, caplog, minutes):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after step 4 of 6"):
        train(tmp_path, TerminateAfter(4), minutes=minutes)
    assert signal.getsignal(signal.SIGTERM) is handler
    count = Steps()
    assert_same(train(tmp_path, count, minutes=60), uninterrupted)
    assert count.steps[0] == 5
    assert "checkpoint-4: training was interrupted; it resumes from this checkpoint" in caplog.text
    assert "checkpoint before it" not in caplog.text


def test_training_continues_if_the_disk_of_the_checkpoints_is_full(
    train, uninterrupted, tmp_path, monkeypatch, caplog
):
    save = torch.save

    def no_room(value, path, *args, **kwargs):
        if "checkpoint-3" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", no_room)
    assert_same(train(tmp_path), uninterrupted)
    assert re.search("checkpoint-3 could not be written .*No space left on device", caplog.text)
    assert not list(tmp_path.glob("*/checkpoint-3"))


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
