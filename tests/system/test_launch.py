"""Two processes train like one: data parallel and with sharded weights, on the CPU over gloo."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from dpo.engine.logprobs import load_model
from tests.support.launch import FSDP, ROOT, start
from tests.support.training import ALL_LOSSES

SCRIPT = ROOT / "tests/support/launched.py"
STOPPED = {"stopped_early": True, "epochs": 4, "learning_rate": 0.03}


def train(processes, model, out, config=None, **settings):
    done = start(
        processes, SCRIPT, model, out, json.dumps({**settings, "sharded": config is not None}), config=config
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted, log = json.loads(out.with_suffix(".json").read_text())
    assert counted == processes
    return log


def assert_close_weights(folder, other):
    (name,) = (path.name for path in folder.glob("*.safetensors"))
    ours, theirs = load_file(folder / name), load_file(other / name)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


def assert_close(log, other):
    assert len(log) == len(other) >= 3
    for ours, theirs in zip(log, other, strict=True):
        ours, theirs = ({k: v for k, v in entry.items() if k != "epoch"} for entry in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("processes", "config", "settings"),
    [
        pytest.param(2, None, {}, marks=pytest.mark.slow),
        (2, None, {"loss": "centered"}),
        pytest.param(2, FSDP, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(4, FSDP, {}, marks=pytest.mark.slow),
        pytest.param(2, FSDP, {"lora": True}, marks=pytest.mark.slow),
        pytest.param(4, FSDP, {"lora": True, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(2, FSDP, {"loss": "ld_dpo"}, marks=pytest.mark.slow),
        pytest.param(2, FSDP, STOPPED, marks=pytest.mark.slow),
    ],
    ids=[
        "ddp",
        "ddp and step-wide statistics",
        "fsdp2 and checkpointing",
        "fsdp2 in four processes",
        "fsdp2 and lora",
        "fsdp2, lora and bf16 in four processes",
        "fsdp2 and log-probs of tokens",
        "fsdp2 and early stop",
    ],
)
def test_processes_train_like_one_and_their_checkpoint_loads_in_one(
    tiny_model_dir, tmp_path, processes, config, settings
):
    # 16 pairs in steps of 5: in the last step one process has no pair.
    alone = train(1, tiny_model_dir, tmp_path / "alone", **settings)
    assert_close(train(processes, tiny_model_dir, tmp_path / "both", config, **settings), alone)
    assert_close_weights(tmp_path / "both", tmp_path / "alone")
    load_model(tmp_path / "both")


@pytest.mark.slow
def test_two_processes_train_like_one_with_every_loss(tiny_model_dir, tmp_path):
    logs = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        done = start(count, SCRIPT, tiny_model_dir, out, json.dumps({"every_loss": True}))
        assert done.returncode == 0, done.stderr[-3000:]
        results = {name: json.loads((out / f"{name}.json").read_text()) for name in ALL_LOSSES}
        assert {counted for counted, _ in results.values()} == {count}
        logs[count] = {name: log for name, (_, log) in results.items()}
    for name in ALL_LOSSES:
        assert_close(logs[2][name], logs[1][name])
        assert_close_weights(tmp_path / "2" / name, tmp_path / "1" / name)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lora": True}, STOPPED], ids=["all weights", "lora", "early stop"])
def test_sharded_training_resumes_from_its_last_checkpoint_after_a_kill(tiny_model_dir, tmp_path, settings):
    interrupted = json.dumps({"sharded": True, "interrupted": True, **settings})
    cut = start(2, SCRIPT, tiny_model_dir, tmp_path / "both", interrupted, config=FSDP)
    assert cut.returncode != 0
    assert not (tmp_path / "both").exists()
    (checkpoint,) = (tmp_path / "both.store").glob("*/checkpoint-3")
    saved = FileSystemReader(checkpoint / "shards").read_metadata().state_dict_metadata
    weights = [name for name in saved if name.startswith("weights.")]
    assert weights
    assert all(".lora_" in name for name in weights) == ("lora" in settings)
    log = train(2, tiny_model_dir, tmp_path / "both", FSDP, **settings)
    assert log == train(2, tiny_model_dir, tmp_path / "undisturbed", FSDP, **settings)
    name = "adapter_model.safetensors" if "lora" in settings else "model.safetensors"
    ours, theirs = (load_file(tmp_path / folder / name) for folder in ("both", "undisturbed"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
