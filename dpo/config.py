"""Typed parameters: `params.yaml` read into frozen dataclasses. Unknown or ill-typed keys are errors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dpo.errors import InputError

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    """The model to align."""

    __pydantic_config__ = STRICT

    base: str
    """`embedded`, a folder under `models/own/`, or a hub id."""
    revision: str | None
    """Commit, tag or branch of a hub id; a hub id without one is refused."""


@dataclass(frozen=True, kw_only=True)
class DataParams:
    """Where preference pairs come from and how many are used."""

    __pydantic_config__ = STRICT

    source: str
    """`embedded`, a `.jsonl`, `.csv` or `.parquet` file under `data/own/`, or a `datasets` hub id."""
    revision: str | None
    """Commit, tag or branch of a hub id; a hub id without one is refused."""
    max_train_pairs: Positive | None
    """Use at most this many pairs for training; null uses all."""
    max_eval_pairs: Positive | None
    """Use at most this many held-out pairs; null uses all."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of prompts held out when the data brings no `split` column."""
    min_rating_gap: Annotated[float, Field(ge=0)]
    """Embedded data only: least difference between the mean human ratings of a pair, on the -4 to 4 scale."""


@dataclass(frozen=True, kw_only=True)
class TokenParams:
    """How text becomes batches; shared by every stage that runs the model."""

    __pydantic_config__ = STRICT

    max_length: Positive
    """Most tokens of prompt and one completion; prompts are cut from the left, completions never."""
    tokens_per_batch: Positive
    """Most tokens in one forward pass; bounds memory and leaves results unchanged."""


@dataclass(frozen=True, kw_only=True)
class OptimizerParams:
    """What SFT and DPO training share."""

    __pydantic_config__ = STRICT

    epochs: Positive
    """Passes over the training pairs."""
    pairs_per_step: Positive
    """Effective batch, in pairs."""
    learning_rate: Rate
    """Peak learning rate."""
    optimizer: Literal["adamw", "rmsprop"]
    """The paper's code uses RMSprop; AdamW is the common choice since."""
    schedule: Literal["linear", "cosine", "constant"]
    """Course of the learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up; 150 in Rafailov et al. 2023, appendix B."""
    max_grad_norm: Rate
    """Gradients are clipped to this norm; 10 in the paper's code."""


@dataclass(frozen=True, kw_only=True)
class SftParams(OptimizerParams):
    """Supervised fine-tuning of the reference."""

    __pydantic_config__ = STRICT

    completions: Literal["both", "chosen"]
    """Which side of each pair is imitated; both keep the reference neutral (Rafailov et al. 2023, section 6)."""
    max_pairs: Positive | None
    """Use the texts of at most this many training pairs; null uses all."""


@dataclass(frozen=True, kw_only=True)
class DpoParams(OptimizerParams):
    """Preference optimisation; one run for each beta."""

    __pydantic_config__ = STRICT

    betas: Annotated[tuple[Annotated[int, Field(gt=0)] | Rate, ...], Field(min_length=1)]
    """Strengths of the KL constraint, eq. 7."""


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """Sampling and judging on held-out prompts."""

    __pydantic_config__ = STRICT

    samples: Positive
    """Answers drawn from the policy and from the reference each."""
    max_new_tokens: Positive
    """Most tokens of an answer."""
    temperature: Rate
    """Softmax temperature; 1 samples the model itself, and the KL estimate needs that."""
    judge: str | None
    """`module:function` from texts to scores, higher is better; null leaves the win rate out."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """The whole of `params.yaml`."""

    __pydantic_config__ = STRICT

    seed: Annotated[int, Field(ge=0)]
    """Seed of every random choice."""
    model: ModelParams
    data: DataParams
    tokens: TokenParams
    sft: SftParams
    dpo: DpoParams
    evaluate: EvaluateParams


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check the parameters.

    Raises:
        InputError: one line for each fault: file, key, what is wrong.
    """
    try:
        values = YAML(typ="safe", pure=True).load(path)
        return TypeAdapter(Params).validate_json(json.dumps(values))
    except (YAMLError, OSError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        faults = [
            f"{path}: {'.'.join(str(part) for part in fault['loc']) or 'top level'}: {_words(fault)}"
            for fault in error.errors()
        ]
        raise InputError("\n".join(faults)) from error


def _words(fault: object) -> str:
    kind, message, given = fault["type"], fault["msg"], fault["input"]  # type: ignore[index]
    if kind == "unexpected_keyword_argument":
        return "unknown key; remove it or mend its name"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return "missing; add it"
    return f"{message[0].lower()}{message[1:]}, got {given!r}"
