"""Two processes train like one: data parallel and with sharded weights, on the CPU over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo.engine.logprobs import load_model
from tests.support.models import free_ports
from tests.support.training import ALL_LOSSES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/support/launched.py"
FSDP = ROOT / "configs/one-node-fsdp.yaml"


def start(processes, *arguments, config=None):
    (port,) = free_ports(1)
    launch = [
        *("-m", "accelerate.commands.launch", "--num_processes", str(processes)),
        *("--num_machines", "1", "--main_process_port", str(port), "--mixed_precision", "no"),
        *(["--config_file", str(config)] if config else ["--multi_gpu", "--dynamo_backend", "no"]),
    ]
    command = [sys.executable, *(launch if processes > 1 else []), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


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
    assert len(log) == len(other) == 4
    for ours, theirs in zip(log, other, strict=True):
        ours, theirs = ({k: v for k, v in entry.items() if k != "epoch"} for entry in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        pytest.param(None, {}, marks=pytest.mark.slow),
        (None, {"loss": "centered"}),
        pytest.param(FSDP, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(FSDP, {"lora": True}, marks=pytest.mark.slow),
    ],
    ids=[
        "ddp",
        "ddp and step-wide statistics",
        "fsdp2 and checkpointing",
        "fsdp2 and lora",
    ],
)
def test_two_processes_train_like_one_and_their_checkpoint_loads_in_one(
    tiny_model_dir, tmp_path, config, settings
):
    # 16 pairs in steps of 5: in the last step one process has no pair.
    alone = train(1, tiny_model_dir, tmp_path / "alone", **settings)
    assert_close(train(2, tiny_model_dir, tmp_path / "both", config, **settings), alone)
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
def test_sharded_training_resumes_from_its_last_checkpoint(tiny_model_dir, tmp_path):
    settings = json.dumps({"sharded": True, "interrupted": True})
    cut = start(2, SCRIPT, tiny_model_dir, tmp_path / "both", settings, config=FSDP)
    assert cut.returncode != 0
    assert not (tmp_path / "both").exists()
    assert list((tmp_path / "both.store").glob("*/checkpoint-3"))
    log = train(2, tiny_model_dir, tmp_path / "both", FSDP)
    assert log == train(2, tiny_model_dir, tmp_path / "undisturbed", FSDP)
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("both", "undisturbed"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
