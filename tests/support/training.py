"""Tiny trainings: settings, pairs, token rows, their reference log-probs, and runs."""

import copy
import dataclasses
import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from dpo.config import load_params
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.tokenization import encode_pairs, labelled_rows
from dpo.training.callbacks import Callback
from dpo.training.losses import Sigmoid
from dpo.training.losses.base import WITH_REFERENCE
from dpo.training.sampler import StepSampler
from dpo.training.settings import (
    DpoSettings,
    LoraSettings,
    OptimizerSettings,
    SftSettings,
    Trial,
)
from dpo.training.train import train_dpo
from tests.support.losses import EXAMPLES, LABELLED


class Killed(BaseException):
    """Stands for a kill: no handler of the code catches it."""


@contextmanager
def killed_at_call(monkeypatch, owner, name, call):
    """Raise Killed at a call of a function, counted from 1, and expect that the block ends with it."""
    original, calls = getattr(owner, name), itertools.count(1)

    def stop(*args, **kwargs):
        if next(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(Killed):
            yield


SHARED = {field.name for field in dataclasses.fields(OptimizerSettings)}


POINT = {field.name for field in dataclasses.fields(Trial)}


def dpo_params(**changes):
    defaults = {
        "epochs": 1,
        "pairs_per_step": 4,
        "optimizer": "adamw",
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "non_finite": "stop",
        "lora": None,
        "early_stop": None,
    }
    return DpoSettings(**{**defaults, **changes})


PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


LOSSES = {name: loss for name, loss in PARAMS.losses.items() if name not in LABELLED}
LOSSES["custom"] = EXAMPLES["custom"]
"""Losses of pairs."""


ALL_LOSSES = LOSSES | {name: PARAMS.losses[name] for name in LABELLED}
"""Losses of pairs and of labelled rows."""


KINDS = ("sigmoid", "simpo", "wpo", "ld_dpo", "aot_unpaired", "kto")
"""Losses that need different things. Tests of training with the others are slow together."""


def every_loss(names=LOSSES):
    """Parameters of a test, of which only one per kind is not slow."""
    return [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in names]


def trial(beta=0.1, learning_rate=1e-3, seed=3, loss="sigmoid"):
    loss = ALL_LOSSES[loss] if isinstance(loss, str) else loss
    return Trial(loss=loss, beta=beta, learning_rate=learning_rate, seed=seed)


def sft_params(**changes):
    shared = {k: v for k, v in dataclasses.asdict(dpo_params()).items() if k in SHARED}
    return SftSettings(**{**shared, "learning_rate": 1e-3, "completions": "both", "max_pairs": None, **changes})


def make_pairs(count):
    joys, bores = (
        ["a joy", "a delight and a joy", "long, good and moving"],
        ["a bore", "neither", "not good, alas"],
    )
    return [
        {
            "id": f"pair {i}",
            "prompt": f"Say something about film {i * 37 % 50}." + " Short." * (i % 4),
            "chosen": f" Film {i} is {joys[i % 3]}.",
            "rejected": f" It is {bores[i // 3 % 3]}" + "!" * (i % 5) + ".",
        }
        for i in range(count)
    ]


def make_rows(folder, count):
    return encode_pairs(make_pairs(count), AutoTokenizer.from_pretrained(folder), 200)


def as_labelled(rows, max_length=200):
    """Return a row for each completion of pairs: chosen is desirable, rejected is not."""
    single = [
        (dataclasses.replace(row, id=f"{row.id}, {label}", completions=(completion,)), label)
        for row in rows
        for label, completion in zip((True, False), row.completions, strict=True)
    ]
    return list(labelled_rows(single, max_length, "the test"))


def rows_of(loss, rows):
    """Return pairs, or as many labelled rows of half of the pairs if the loss, given by name, needs labels."""
    return as_labelled(rows[: len(rows) // 2]) if loss in LABELLED else rows


def make_reference(folder, rows):
    table = sequence_logps(load_model(folder, frozen=True), rows, 1000)
    return {row.id: tuple(logps) for row, logps in zip(rows, table.tolist(), strict=True)}


LORA = LoraSettings(rank=4, alpha=8)


@dataclass(frozen=True, kw_only=True)
class Centered(Sigmoid):
    """The sigmoid loss of h minus its mean over the optimizer step, and weighted by its rank in the step."""

    name = "centered"
    needs = WITH_REFERENCE | {"statistics"}

    def statistics(self, step, beta):
        h = self._h(step)
        return {"mean": h.mean(), "sorted": h.sort().values}

    def _forward(self, pairs, beta):
        h = self._h(pairs)
        rank = (pairs.statistics["sorted"] < h.detach()[:, None] - 1e-3).sum(1)
        return -logsigmoid(beta * (h - pairs.statistics["mean"])) * (1 + rank)


def online_reference(model, *, lora):
    """Return a function that computes reference log-probs by `model` without its adapters, or by a copy of it."""
    frozen = model if lora else copy.deepcopy(model).eval()

    @torch.no_grad()
    def answer(batch):
        if not lora:
            return frozen.to(batch.input_ids.device)(batch)
        frozen.model.disable_adapters()
        try:
            return frozen(batch)
        finally:
            frozen.model.enable_adapters()

    return answer


def run_dpo(folder, rows, reference, max_tokens_per_microbatch=10_000, **changes):
    model = load_model(folder)
    point = trial(**{name: changes.pop(name) for name in POINT & changes.keys()})
    log = train_dpo(
        model,
        rows,
        reference,
        dpo_params(**changes),
        point,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
    )
    return log, {name: weight.detach().clone() for name, weight in model.model.state_dict().items()}


def steps_of(rows, seed, pairs_per_step=4, epochs=1):
    """The rows of each optimizer step, with one micro-batch per step."""
    sampler = StepSampler(
        [row.tokens for row in rows],
        rows_per_step=pairs_per_step,
        max_tokens_per_microbatch=10**6,
        epochs=epochs,
        seed=seed,
    )
    return [[rows[i] for i in batch] for epoch in range(epochs) for (batch,) in sampler.steps(epoch)]


class Steps(Callback):
    def __init__(self):
        self.steps = []

    def on_log(self, entry):
        if "loss" in entry:
            self.steps.append(entry["step"])
