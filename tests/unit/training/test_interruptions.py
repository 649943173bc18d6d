"""Training that is interrupted ends with the same bits: kills, SIGTERM and damaged checkpoints."""

import os
import re
import shutil
import signal

import pytest
import torch

from dpo.common.errors import Stopped
from dpo.engine.logprobs import load_model
from dpo.training.callbacks import Callback
from dpo.training.checkpoints import CheckpointStore, last_checkpoint
from dpo.training.losses import Custom
from dpo.training.settings import EarlyStopSettings
from dpo.training.train import train_sft
from tests.support.training import (
    ALL_LOSSES,
    LORA,
    Killed,
    Steps,
    every_loss,
    make_reference,
    rows_of,
    sft_params,
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
