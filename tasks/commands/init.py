"""Write a `params.yaml` that fits preference data and a model: `dpo init data/own/pairs.jsonl`."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.config import Params, load_params
from tasks.common.git import committed_file
from tasks.common.paths import BASE

PARAMS = Path("params.yaml")
DEFAULT_SIZE, DEFAULT_CONTEXT = 1.35e8, 2048  # of the default model, in parameters and tokens
CHARACTERS_PER_TOKEN = 4  # of English text, if there is no tokenizer
RATES = ((3e8, 2e-5), (1.5e9, 5e-6), (5e9, 1e-6), (math.inf, 5e-7))
"""Learning rates of DPO on all weights, by the number of parameters below which they hold. 5e-7 for 7B is that of
Tunstall et al. 2023, "Zephyr: Direct Distillation of LM Alignment". The others are starting points."""
SFT_RATES = ((1.5e9, 2e-5), (math.inf, 1e-5))
MIN_STEPS, MAX_EPOCHS = 50, 3

Choices = dict[str, tuple[Any, str]]
"""Values of keys, each with its reason, which becomes the comment of the line."""


def init(data: str, model: str | None, *, force: bool) -> None:
    """Inspect data and model, and set the keys of `params.yaml` that depend on them, with one comment each.

    Raises:
        InputError: the data or the model cannot be used, or `params.yaml` has changes that git does not have.
    """
    if not force and committed_file(PARAMS) != PARAMS.read_bytes():
        raise InputError(f"{PARAMS}: it has uncommitted changes; commit them first, or overwrite it with --force")
    params, own = load_params(), Path("data/own")
    if own.resolve() not in Path(data).resolve().parents:
        raise InputError(f"{data}: not in {own}, the folder that DVC tracks; copy it there")
    size, context = describe(model)
    choices = model_choices(model, size) | data_choices(params, data, model, context)
    if params.sft is None:
        choices = {key: choice for key, choice in choices.items() if not key.startswith("sft.")}
    with atomic_write(PARAMS) as tmp:
        tmp.write_text(with_choices(PARAMS.read_text(), choices))
        load_params(tmp)
    print("\n" + "\n".join(f"{key}: {json.dumps(value)}    # {why}" for key, (value, why) in choices.items()))
    print(f"\n{PARAMS} is written; `dvc repro` runs the pipeline")


def describe(model: str | None) -> tuple[float, int]:
    """Return the number of parameters of a model and its context in tokens. None is the default model.

    Raises:
        InputError: the model is not a readable folder, or its size is unknown.
    """
    if model is None:
        return DEFAULT_SIZE, DEFAULT_CONTEXT
    from transformers import AutoConfig

    from dpo.engine.flops import shape_of
    from dpo.engine.pretrained import load_weights

    if not Path(model).is_dir():
        raise InputError(f"--model: {model} is not a folder; save the model in models/own and name that folder")
    config = load_weights(AutoConfig, model)
    files = list(Path(model).glob("*.safetensors"))
    bytes_each = 4 if str(getattr(config, "dtype", None)).endswith("float32") else 2
    size = sum(file.stat().st_size for file in files) / bytes_each if files else shape_of(config).parameters
    return size, getattr(config, "max_position_embeddings", DEFAULT_CONTEXT)


def model_choices(model: str | None, size: float) -> Choices:
    """Return model and learning rates."""
    words = f"{size / 1e9:.2g} billion parameters"
    sft, dpo = (next(rate for limit, rate in rates if size < limit) for rates in (SFT_RATES, RATES))
    return {
        "model.base": (model or "default", "the model to align"),
        "sft.learning_rate": (sft, f"for {words}"),
        "sweep.learning_rates": ([dpo], f"for {words}, all weights; with dpo.lora about ten times as much"),
    }


def data_choices(params: Params, data: str, model: str | None, context: int) -> Choices:
    """Return what depends on number and lengths of the pairs.

    Raises:
        InputError: the data must not be used.
    """
    facts = inspect(params, data, model, context)
    scale = 1 if facts["unit"] == "tokens" else CHARACTERS_PER_TOKEN
    prompt, chosen, rejected = (facts["lengths"][part]["p99"] / scale for part in ("prompt", "chosen", "rejected"))
    length = min(context, 64 * math.ceil((prompt + max(chosen, rejected) + 16) / 64))
    train, held_out = facts["train"]["pairs"], facts["eval"]["pairs"]
    step = 16 if train < 2_000 else 32 if train < 20_000 else 64
    epochs = min(MAX_EPOCHS, max(1, math.ceil(MIN_STEPS * step / max(train, 1))))
    steps = epochs * math.ceil(train / step)
    labelled: Choices = {
        "losses.kto": (dataclasses.asdict(params.losses["kto"]), "for labelled rows"),
        "sweep.losses": (["kto"], "the loss of labelled rows"),
        "sweep.reference_free_losses": ([], "losses of pairs"),
    }
    return {
        "data.source": (data, f"{train} training pairs, {held_out} held-out pairs"),
        "data.max_train_pairs": (None, "use all"),
        "data.max_eval_pairs": (None, "use all"),
        "engine.max_length": (length, f"99% of prompts and completions fit; the model reads {context} tokens"),
        "engine.max_tokens_per_microbatch": (
            max(1024, 2 * length),
            "two pairs or more at once; less needs less memory",
        ),
        "sft.max_pairs": (None, "use all"),
        "dpo.pairs_per_step": (step, f"for {train} pairs"),
        "dpo.epochs": (epochs, f"{steps} steps"),
        "dpo.warmup_ratio": (0.1, f"of {steps} steps"),
        "evaluate.samples": (min(256, max(held_out, 1)), "held-out prompts; more give narrower intervals"),
        "evaluate.max_new_tokens": ("auto", "the 95% quantile of the held-out completions"),
        "evaluate.judges": ([], "add a judge of your task to compare responses"),
        "compare.select": ("reward_accuracy", "win_rate needs a judge"),
        **(labelled if facts["kind"] == "labelled" else {}),
    }


def inspect(params: Params, data: str, model: str | None, context: int) -> dict[str, Any]:
    """Validate the data, print the table of the validation, and return its metrics."""
    from dpo.data.ingest import write_raw_pairs
    from dpo.data.readers import read_files
    from tasks.validate import raise_errors, validate_and_report

    tokenizer = Path(model) if model else (BASE if BASE.is_dir() else None)
    params = dataclasses.replace(params, engine=dataclasses.replace(params.engine, max_length=context))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_raw_pairs(read_files([data]), place / "raw.parquet", data, params.data)
        outputs = {name: place / f"{name}.parquet" for name in ("train", "eval", "quarantine")}
        outputs |= {"report": place / "report.html", "metrics": place / "metrics.json"}
        caps: dict[str, int | None] = {"train": None, "eval": None}
        result = validate_and_report(params, place / "raw.parquet", data, tokenizer, caps, outputs)
    raise_errors(result)
    return result.metrics


def with_choices(text: str, choices: Choices) -> str:
    """Return the text of `params.yaml` with other values, each with its reason as comment; the rest is kept."""
    lines = text.splitlines()
    for key, (value, reason) in choices.items():
        group, name = key.split(".")
        start = next(number for number, line in enumerate(lines) if line.startswith(f"{group}:")) + 1
        stop = next((n for n in range(start, len(lines)) if lines[n][:1].strip()), len(lines))
        first = next((n for n in range(start, stop) if lines[n].startswith(f"  {name}:")), start)
        last = first + lines[first].startswith(f"  {name}:")
        while first < last < stop and lines[last].startswith(("   ", "  -")):
            last += 1  # the lines of a list or a section
        written = value if isinstance(value, str) else json.dumps(value)
        lines[first:last] = [f"  {name}: {written}  # {reason}"]
    return "\n".join(lines) + "\n"
