"""A training that is cut off, starved or fed a number that is none."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from dpo.common.errors import InputError, Stopped
from dpo.engine.logprobs import load_model
from dpo.training.checkpoints import Progress, last_checkpoint
from dpo.training.loop import DivergenceAlarm, PackedTrainer
from dpo.training.settings import EarlyStopSettings
from dpo.training.train import train_dpo, train_sft
from tests.support.training import LORA, LOSSES, dpo_params, make_reference, make_rows, sft_params, trial

EARLY_STOP = EarlyStopSettings(validation_share=0.3, every_steps=1, patience=2)


class Cut(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


class CutAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Cut


class TermAt(CutAt):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Count(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.fixture(scope="module")
def rows(tiny_model_dir):
    return make_rows(tiny_model_dir, 18)


@pytest.fixture(scope="module")
def reference(tiny_model_dir, rows):
    return make_reference(tiny_model_dir, rows)


@pytest.fixture(scope="module")
def train(tiny_model_dir, rows, reference):
    """Two epochs of three steps, the last of each short; returns the log and the weights."""

    def run(
        root=None, *callbacks, max_tokens_per_microbatch=300, rows=rows, reference=reference, minutes=0,
        learning_rate=1e-3, **changes,
    ):  # fmt: skip
        model = load_model(tiny_model_dir)
        params = dpo_params(
            **{"epochs": 2, "pairs_per_step": 7, "schedule": "cosine", "warmup_ratio": 0.3, **changes}
        )
        progress = None if root is None else Progress(root, minutes)
        log = train_dpo(
            model, rows, reference, params, trial(learning_rate=learning_rate), LOSSES,
            max_tokens_per_microbatch=max_tokens_per_microbatch, progress=progress, callbacks=callbacks,
        )  # fmt: skip
        return log, {name: weight.detach().clone() for name, weight in model.model.state_dict().items()}

    return run


@pytest.fixture(scope="module")
def undisturbed(train):
    return train()


@pytest.fixture(scope="module")
def cut_off(train, tmp_path_factory):
    """What a training that was killed in its fifth step left behind."""
    root = tmp_path_factory.mktemp("cut off")
    with pytest.raises(Cut):
        train(root, CutAt(4))
    return root


@pytest.fixture
def root(cut_off, tmp_path):
    return shutil.copytree(cut_off, tmp_path / "progress")


def assert_same(one, other):
    assert [list(entry.items()) for entry in one[0]] == [list(entry.items()) for entry in other[0]]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "rmsprop"}, {"lora": LORA}, {"early_stop": EARLY_STOP}, {"gradient_checkpointing": True}],
    ids=["adamw", "rmsprop", "lora", "early_stop", "gradient_checkpointing"],
)
def test_a_training_cut_off_again_and_again_ends_with_the_same_log_and_the_same_bits(train, tmp_path, changes):
    undisturbed = train(**changes)
    cuts = (3, 5) if len(undisturbed[0]) == 6 else (2,)
    for cut in cuts:
        with pytest.raises(Cut):
            train(tmp_path, CutAt(cut), **changes)
    count = Count()
    assert_same(train(tmp_path, count, **changes), undisturbed)
    assert count.steps[0] == cuts[-1] + 1


def test_sft_goes_on_too(tiny_model_dir, rows, tmp_path):
    def run(*callbacks, progress=None):
        model = load_model(tiny_model_dir)
        log = train_sft(
            model,
            rows,
            sft_params(),
            max_tokens_per_microbatch=200,
            seed=3,
            progress=progress,
            callbacks=callbacks,
        )
        return log, model.model.state_dict()

    progress = Progress(tmp_path, 0)
    with pytest.raises(Cut):
        run(CutAt(3), progress=progress)
    count = Count()
    assert_same(run(count, progress=progress), run())
    assert count.steps == [4, 5]


def test_two_checkpoints_stay_whatever_the_clock_says(train, tmp_path):
    class ClockSetBack(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            newest = max(tmp_path.glob("*/checkpoint-*"), key=lambda path: int(path.name[11:]))
            os.utime(newest, (1e9 - 1e6 * state.global_step,) * 2)

    with pytest.raises(Cut):
        train(tmp_path, ClockSetBack(), CutAt(4))
    assert sorted(path.name for path in tmp_path.glob("*/checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_checkpoints_keep_to_their_cadence(train, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dpo.training.loop.time.monotonic", lambda: now[0])

    class MinuteAStep(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            now[0] += 60.0

    saved = []

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    train(tmp_path, MinuteAStep(), Saved(), minutes=2)
    assert saved == [2, 4]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "unsealed", "empty seal"])
@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(root, caplog, file, damage):
    newest = next(root.glob("*/checkpoint-4"))
    data = bytearray((newest / file).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (newest / file).write_bytes(data)
    elif damage == "cut":
        (newest / file).write_bytes(data[:-7])
    elif damage == "remove":
        (newest / file).unlink()
    elif damage == "unsealed":
        (newest / "sha256.json").unlink()
    else:
        (newest / "sha256.json").write_text("")
    assert last_checkpoint(newest.parent).name == "checkpoint-3"
    assert not newest.exists()
    fault = f"damaged: {file}" if damage in ("flip", "cut") else "not whole"
    assert re.search(rf"checkpoint-4: {re.escape(fault)}.*left out, training goes on from", caplog.text)


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(train, undisturbed, root):
    next(root.glob("*/checkpoint-4/optimizer.pt")).write_bytes(b"")
    count = Count()
    assert_same(train(root, count), undisturbed)
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
def test_another_training_finds_no_checkpoint_of_this_one(train, rows, reference, root, changes):
    if "rows" in changes:
        changes = {"rows": rows[:-1]}
    if "reference" in changes:
        changes = {"reference": reference | {"pair 3": (reference["pair 3"][0] + 1e-6, reference["pair 3"][1])}}
    count = Count()
    with pytest.raises(Cut):
        train(root, count, CutAt(1), **changes)
    assert count.steps == [1]


def test_another_precision_finds_no_checkpoint_of_this_one(tiny_model_dir, rows, tmp_path):
    def sft(precision, *callbacks):
        model = load_model(tiny_model_dir, precision)
        train_sft(
            model,
            rows,
            sft_params(),
            max_tokens_per_microbatch=300,
            seed=3,
            progress=Progress(tmp_path, 0),
            callbacks=callbacks,
        )

    with pytest.raises(Cut):
        sft("fp32", CutAt(2))
    count = Count()
    sft("bf16", count)
    assert count.steps[0] == 1


def test_a_training_killed_after_it_stopped_early_stops_there_again(train, tmp_path):
    class CutAtEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            raise Cut

    stop = {"early_stop": EarlyStopSettings(validation_share=0.3, every_steps=1, patience=1), "epochs": 9}
    whole = train(learning_rate=0.5, **stop)
    assert len(whole[0]) < 18
    with pytest.raises(Cut):
        train(tmp_path, CutAtEnd(), learning_rate=0.5, **stop)
    assert_same(train(tmp_path, learning_rate=0.5, **stop), whole)


@pytest.mark.parametrize("minutes", [60, 0], ids=["without a checkpoint", "right after one"])
def test_sigterm_saves_and_stops_and_the_next_run_goes_on(train, undisturbed, tmp_path, caplog, minutes):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped after step 4 of 6"):
        train(tmp_path, TermAt(4), minutes=minutes)
    assert signal.getsignal(signal.SIGTERM) is handler
    count = Count()
    assert_same(train(tmp_path, count, minutes=60), undisturbed)
    assert count.steps[0] == 5
    assert "checkpoint-4: this training was cut off before; it goes on from here" in caplog.text
    assert "left out" not in caplog.text


def test_a_full_disk_under_the_checkpoints_costs_a_warning(train, undisturbed, tmp_path, monkeypatch, caplog):
    save = torch.save

    def no_room(value, path, *args, **kwargs):
        if "checkpoint-3" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", no_room)
    assert_same(train(tmp_path), undisturbed)
    assert re.search("checkpoint-3 could not be written .*No space left on device", caplog.text)
    assert not list(tmp_path.glob("*/checkpoint-3"))


def starve(monkeypatch, most_rows, when):
    """Fail as the CUDA allocator does on micro-batches of more than `most_rows` pairs."""
    compute, backward = PackedTrainer.compute_loss, torch.Tensor.backward

    def compute_loss(self, model, inputs, **kwargs):
        self.starved = len(inputs["batch"].ids) > most_rows
        if self.starved and when == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        loss = compute(self, model, inputs, **kwargs)
        if self.starved:
            loss.register_hook(lambda grad: grad * 7)  # what was accumulated so far is worthless
            backward(loss, retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(PackedTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("max_tokens_per_microbatch", [300, 10_000])
def test_too_little_memory_means_smaller_micro_batches_and_the_same_steps(
    train, monkeypatch, caplog, when, max_tokens_per_microbatch
):
    plain = train(max_tokens_per_microbatch=max_tokens_per_microbatch)
    starve(monkeypatch, 1, when)
    starved = train(max_tokens_per_microbatch=max_tokens_per_microbatch)
    for ours, theirs in zip(starved[0], plain[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, weight in plain[1].items():
        torch.testing.assert_close(starved[1][name], weight, rtol=1e-4, atol=1e-5)
    assert re.search(r"step 1: out of memory; each micro-batch is computed in 2 parts from here on", caplog.text)


def test_too_little_memory_for_one_pair_is_said_with_its_mend(train, monkeypatch):
    starve(monkeypatch, 0, "forward")
    with pytest.raises(InputError, match="memory does not suffice for one pair; lower it, or set gradient_check"):
        train()


def test_other_errors_are_not_taken_for_too_little_memory(train, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(PackedTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train()


def spoil_gradient(monkeypatch, pair):
    """A finite loss with a gradient that is not, wherever `pair` is in the micro-batch."""
    compute = PackedTrainer.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        loss = compute(self, model, inputs, **kwargs)
        if pair in inputs["batch"].ids:
            loss.register_hook(lambda grad: grad * math.inf)
        return loss

    monkeypatch.setattr(PackedTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_none_stops_before_the_step_and_the_stop_can_be_replayed(
    train, reference, tmp_path, monkeypatch, where
):
    broken = reference
    if where == "loss":
        broken = reference | {"pair 5": (math.nan, 0.0)}
    else:
        spoil_gradient(monkeypatch, "pair 5")
    with pytest.raises(FloatingPointError, match=r"pair 5\b") as first:
        train(tmp_path, reference=broken, minutes=60)
    count = Count()
    with pytest.raises(FloatingPointError) as again:
        train(tmp_path, count, reference=broken, minutes=60)
    assert str(again.value) == str(first.value)
    assert count.steps == []
    (file,) = tmp_path.glob("*/not-finite-step-*.json")
    kept = json.loads(file.read_text())
    assert "pair 5" in [row["id"] for row in kept["rows"]]
    assert f"step {kept['step']}: {kept['fault']}" in str(first.value)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_step_changes_no_weight_and_is_told(
    train, rows, reference, tmp_path, monkeypatch, caplog, where
):
    broken = reference
    if where == "loss":
        broken = reference | {"pair 5": (math.nan, 0.0)}
    else:
        spoil_gradient(monkeypatch, "pair 5")
    weights = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            weights[state.global_step] = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()

    log, final = train(
        tmp_path, Watch(), reference=broken, non_finite="skip", epochs=1, schedule="constant", warmup_ratio=0.0
    )
    skipped = [entry["step"] for entry in log if math.isnan(entry["loss"])]
    assert len(skipped) == 1
    weights[len(log)] = torch.cat([w.flatten() for name, w in final.items() if name != "lm_head.weight"])
    for step in range(1, len(log) + 1):
        assert torch.equal(weights[step], weights[step - 1]) == (step in skipped)
    assert all(weight.isfinite().all() for weight in final.values())
    assert f"step {skipped[0]}: the {where}" in caplog.text
    assert "the step is skipped" in caplog.text
    (file,) = re.findall(r"their tokens are in (\S+);", caplog.text)
    Progress(tmp_path, 0).discard()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [Path(file)]


def test_a_gradient_far_above_the_usual_raises_an_alarm(train, monkeypatch, caplog):
    compute = PackedTrainer.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        loss = compute(self, model, inputs, **kwargs)
        return loss * 1e6 if self.state.global_step == 5 else loss

    monkeypatch.setattr(PackedTrainer, "compute_loss", compute_loss)
    train()
    assert re.search(r"step 6: the gradient norm is .* times the median of the steps before", caplog.text)
    assert caplog.text.count("times the median") == 1


def test_a_gradient_is_compared_with_the_last_hundred_steps(caplog):
    history = [{"grad_norm": 1.0}] * 500 + [{"grad_norm": 1000.0}] * 100 + [{"eval_loss": 1.0}]
    for norm, alarms in ((9000.0, 0), (200_000.0, 1)):
        entry = {"grad_norm": norm, "loss": 0.7}
        state = SimpleNamespace(global_step=601, log_history=[*history, entry])
        DivergenceAlarm().on_log(None, state, None, entry)
        assert caplog.text.count("200 times the median") == alarms
