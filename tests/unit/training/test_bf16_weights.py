"""Training of weights in bf16: stochastic rounding, resuming, and settings that do not fit."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.training.callbacks import Callback
from dpo.training.checkpoints import CheckpointStore
from dpo.training.optimizers import RoundingAdamW, create_optimizer, round_to_bf16
from dpo.training.train import train_dpo
from tests.support.training import dpo_params, trial


def test_rounding_is_unbiased_and_yields_one_of_the_two_neighbours():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(50), torch.randn(50) * 1e-6, torch.tensor([0.0, 1.0, -2.0])])
    values = torch.cat([values, torch.tensor([1 + 2**-9, -1 - 2**-12])])
    count, generator = 20_000, torch.Generator().manual_seed(1)
    rounded = round_to_bf16(values.repeat(count, 1), generator).double()
    low = (values.view(torch.int32) & -(2**16)).view(torch.float32).double()
    step = torch.exp2(torch.floor(torch.log2(values.double().abs().clamp_min(1e-30))) - 7) * values.sign()
    assert bool(((rounded == low) | (rounded == low + step)).all())
    share = ((values.double() - low) / step.where(step != 0, 1.0)).clamp(0, 1)
    deviation = step.abs() * (share * (1 - share) / count).sqrt()
    assert bool(((rounded.mean(0) - values.double()).abs() <= 5 * deviation + 1e-12 * values.abs()).all())
    exact = values.to(torch.bfloat16)
    assert torch.equal(round_to_bf16(exact.float(), generator), exact)


def test_updates_below_the_resolution_of_bf16_move_the_weights_in_the_mean():
    weight = nn.Parameter(torch.ones(200, 200, dtype=torch.bfloat16))
    exact = nn.Parameter(torch.ones(1))
    ours, theirs = RoundingAdamW([weight], seed=3), torch.optim.AdamW([exact], weight_decay=0.0)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["lr"] = 1e-4  # numbers below 1 are 2^-8 apart, so rounding to nearest loses it
    for _ in range(50):
        weight.grad, exact.grad = torch.ones_like(weight), torch.ones_like(exact)
        ours.step()
        theirs.step()
    assert torch.tensor(1.0 - 1e-4).to(torch.bfloat16) == 1
    assert weight.float().mean().item() - 1 == pytest.approx(exact.item() - 1, rel=0.03)


def test_fp32_weights_are_updated_as_by_adamw():
    torch.manual_seed(0)
    start = torch.randn(7, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = RoundingAdamW([ours], seed=3), torch.optim.AdamW([theirs], weight_decay=0.0, fused=True)
    for _ in range(4):
        ours.grad = torch.randn(7, 5)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


class KilledError(Exception):
    """The end of a training without a checkpoint."""


class KillAfter(Callback):
    def on_log(self, entry):
        if entry["step"] == 4:
            raise KilledError


@pytest.fixture
def train(tiny_model_dir, rows):
    table = sequence_logps(load_model(tiny_model_dir, "bf16"), rows, 1000).tolist()
    reference = {row.id: tuple(logps) for row, logps in zip(rows, table, strict=True)}

    def run(*callbacks, store=None, seed=3, **changes):
        model = load_model(tiny_model_dir, "bf16")
        settings = {"epochs": 3, "pairs_per_step": 7, "weights": "bf16", **changes}
        log = train_dpo(
            model, rows, reference, dpo_params(**settings), trial(seed=seed, learning_rate=1e-3),
            max_tokens_per_microbatch=100, store=store, callbacks=callbacks,
        )  # fmt: skip
        return model, log

    return run


def test_training_in_bf16_starts_at_margin_zero_and_learns(train, rows, tmp_path):
    model, log = train()
    assert log[0]["rewards/margins"] == log[0]["rewards/chosen"] == 0.0
    assert log[-1]["loss"] < math.log(2) - 0.05
    assert log[-1]["loss"] == pytest.approx(train(weights="fp32")[1][-1]["loss"], abs=0.03)
    kinds = {name: weight.dtype for name, weight in model.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "_proj" in name} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if "_proj" not in name} == {torch.float32}
    model.model.save_pretrained(tmp_path / "policy")
    saved = sequence_logps(load_model(tmp_path / "policy", "bf16", frozen=True), rows, 1000)
    assert torch.equal(saved, sequence_logps(model, rows, 1000))


def test_an_interrupted_training_ends_with_the_same_bits(train, tmp_path):
    store = CheckpointStore(tmp_path, 0)
    with pytest.raises(KilledError):
        train(KillAfter(), store=store)
    (resumed, its_log), (model, log) = train(store=store), train()
    assert its_log == log
    ours, theirs = resumed.model.state_dict(), model.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_random_numbers_depend_on_the_seed_and_the_step_alone():
    def updated(seed, steps):
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = create_optimizer("adamw", nn.ParameterList([weight]), seed)
        for _ in range(steps):
            torch.rand(steps)  # another use of random numbers
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach()

    assert torch.equal(updated(1, 3), updated(1, 3))
    assert not torch.equal(updated(1, 3), updated(2, 3))
    assert not torch.equal(updated(1, 1), updated(1, 2))


def test_a_device_that_cannot_round_is_an_input_error(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("randint: not implemented")

    monkeypatch.setattr(torch, "randint", refuse)
    with pytest.raises(InputError, match=r"weights: bf16 is not supported on the device 'cpu'.*set it to fp32"):
        RoundingAdamW([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer: adamw\n": "optimizer: adamw\n  lora: {rank: 4, alpha: 8}\n"},
            "has no effect with an adapter",
        ),
        ({"optimizer: adamw\n": "optimizer: rmsprop\n"}, "needs the optimizer adamw"),
        ({"precision: bf16": "precision: fp32"}, "needs engine.precision: bf16"),
    ],
)
def test_settings_that_do_not_fit_are_input_errors(tmp_path, changes, message):
    text = Path("examples/full-1b-24gb.yaml").read_text()
    before, dpo = text.split("\ndpo:\n")
    dpo = dpo.replace("optimizer: adamw_8bit\n", "optimizer: adamw\n  weights: bf16\n")
    text = f"{before}\ndpo:\n{dpo}"
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert load_params(path).dpo.weights == "bf16"
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(InputError, match=f"dpo.weights: bf16 {message}"):
        load_params(path)
