"""Write a `params.yaml` that fits preference data and a model: `dpo init data/own/pairs.jsonl`."""

import dataclasses
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dpo.common.errors import InputError, TransientError
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

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files of a hub model without its weights: configuration and tokenizer."""

Choices = dict[str, tuple[Any, str]]
"""Values of keys, each with its reason, which becomes the comment of the line."""


@dataclass(frozen=True)
class Description:
    """What the choice of settings needs to know of a model."""

    parameters: float
    context: int
    """Tokens that the model can read."""
    tokenizer: Path | None
    """Folder with the tokenizer, None if there is none yet."""
    revision: str | None = None
    """Commit of a hub id."""


def init(data: str, model: str | None, revision: str | None = None, *, force: bool) -> None:
    """Inspect data and model, and set the keys of `params.yaml` that depend on them, with one comment each.

    Raises:
        InputError: the data or the model cannot be used, or `params.yaml` has changes that git does not have.
        TransientError: the model is a hub id, and the hub is unreachable.
    """
    if not force and committed_file(PARAMS) != PARAMS.read_bytes():
        raise InputError(f"{PARAMS}: it has uncommitted changes; commit them first, or overwrite it with --force")
    params, own = load_params(), Path("data/own")
    if own.resolve() not in Path(data).resolve().parents:
        raise InputError(f"{data}: not in {own}, the folder that DVC tracks; copy it there")
    described = describe(model, revision)
    choices = model_choices(model, described.parameters) | data_choices(params, data, described)
    if params.model.revision or described.revision:
        choices["model.revision"] = (
            described.revision,
            "commit of the hub id" if described.revision else "no hub id",
        )
    if params.sft is None:
        choices = {key: choice for key, choice in choices.items() if not key.startswith("sft.")}
    with atomic_write(PARAMS) as tmp:
        tmp.write_text(with_choices(PARAMS.read_text(), choices))
        load_params(tmp)
    print("\n" + "\n".join(f"{key}: {json.dumps(value)}    # {why}" for key, (value, why) in choices.items()))
    print(f"\n{PARAMS} is written; `dvc repro` runs the pipeline")


def describe(model: str | None, revision: str | None = None) -> Description:
    """Describe a folder or a hub id at a revision, `main` by default. None is the default model.

    Raises:
        InputError: the model is neither a readable folder nor a model of the hub, or its size is unknown.
        TransientError: the hub is unreachable.
    """
    if model is not None and not Path(model).is_dir():
        return describe_hub_model(model, revision)
    if revision is not None:
        raise InputError(f"--revision: {model or 'the default model'} is not a hub id; omit the option")
    if model is None:
        return Description(DEFAULT_SIZE, DEFAULT_CONTEXT, BASE if BASE.is_dir() else None)
    return describe_folder(Path(model))


def describe_folder(folder: Path) -> Description:
    """Describe a model folder, which may lack the weights. Raise InputError if it is unreadable."""
    from transformers import AutoConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

    from dpo.engine.flops import shape_of
    from dpo.engine.pretrained import load_weights

    config = load_weights(AutoConfig, folder)
    size = float(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    if size == 0 and (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        size = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["metadata"]["total_size"]
    bytes_each = 4 if str(getattr(config, "dtype", None)).endswith("float32") else 2
    parameters = size / bytes_each or shape_of(config).parameters
    return Description(parameters, getattr(config, "max_position_embeddings", DEFAULT_CONTEXT), folder)


def describe_hub_model(model: str, revision: str | None) -> Description:
    """Describe a model of the hub by its small files. The commit of the revision makes the run reproducible."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]

    reach = "save the model in models/own and name that folder"
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(SMALL_FILES)))
    except HFValidationError as error:
        raise InputError(f"--model: {model} is neither a folder nor a hub id, OWNER/NAME; {reach}") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        at = f" at the revision {revision}" if revision else ""
        raise InputError(
            f"--model: {model} is not a folder, and the hub has no such model{at} that you can read: {reason}; "
            "correct the id, or log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, ClientError) as error:
        raise TransientError(
            f"--model: {model} is not a folder, and the hub at {constants.ENDPOINT} is unreachable "
            f"({error.__cause__ or error}); check HF_ENDPOINT and HF_HUB_OFFLINE, or {reach}"
        ) from error
    if not (folder / "config.json").is_file():
        raise InputError(
            f"--model: {model} has no config.json, so it is no model of transformers; use another one"
        )
    return dataclasses.replace(describe_folder(folder), revision=folder.name)


def model_choices(model: str | None, size: float) -> Choices:
    """Return model and learning rates."""
    words = f"{size / 1e9:.2g} billion parameters"
    sft, dpo = (next(rate for limit, rate in rates if size < limit) for rates in (SFT_RATES, RATES))
    return {
        "model.base": (model or "default", "the model to align"),
        "sft.learning_rate": (sft, f"for {words}"),
        "sweep.learning_rates": ([dpo], f"for {words}, all weights; with dpo.lora about ten times as much"),
    }


def data_choices(params: Params, data: str, model: Description) -> Choices:
    """Return what depends on number and lengths of the pairs.

    Raises:
        InputError: the data must not be used.
    """
    context = model.context
    facts = inspect(params, data, model)
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


def inspect(params: Params, data: str, model: Description) -> dict[str, Any]:
    """Validate the data, print the table of the validation, and return its metrics."""
    from dpo.data.ingest import write_raw_pairs
    from dpo.data.readers import read_files
    from tasks.validate import raise_errors, validate_and_report

    params = dataclasses.replace(params, engine=dataclasses.replace(params.engine, max_length=model.context))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_raw_pairs(read_files([data]), place / "raw.parquet", data, params.data)
        outputs = {name: place / f"{name}.parquet" for name in ("train", "eval", "quarantine")}
        outputs |= {"report": place / "report.html", "metrics": place / "metrics.json"}
        caps: dict[str, int | None] = {"train": None, "eval": None}
        result = validate_and_report(params, place / "raw.parquet", data, model.tokenizer, caps, outputs)
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
        plain = (
            isinstance(value, str) and YAML(typ="safe").load(value) == value
        )  # YAML reads some hashes as numbers
        written = value if plain else json.dumps(value)
        lines[first:last] = [f"  {name}: {written}  # {reason}"]
    return "\n".join(lines) + "\n"
