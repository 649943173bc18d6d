"""Typed parameters: `params.yaml` read into frozen dataclasses. Unknown or ill-typed keys are errors."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from dpo.errors import InputError

Precision = Literal["fp32", "bf16"]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Action = Literal["error", "quarantine", "warn"]
Unpaired = Literal["error", "quarantine"]
Notice = Literal["error", "warn"]
Share = Annotated[float, Field(ge=0, le=1)]
LossName = Literal["sigmoid", "ipo", "conservative", "robust", "hinge", "length_normalised", "rpo", "dpop"]
CREDENTIALS = re.compile(r"//[^/\s]*@")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value stands there twice")
    return values


Several = (Field(min_length=1), AfterValidator(_distinct))


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

    source: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """`embedded`, a file or folder (or a list of them) under `data/own/`, or a `datasets` hub id."""
    revision: str | None
    """Commit, tag or branch of a hub id; a hub id without one is refused."""
    pairing: Literal["best_worst", "best_rest"]
    """Of several rated completions of a prompt: the best against the worst, or against each lesser one."""
    max_train_pairs: Positive | None
    """Use at most this many sound pairs for training; null uses all."""
    max_eval_pairs: Positive | None
    """Use at most this many sound held-out pairs; null uses all."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of prompts held out when the data brings no `split` column."""
    min_rating_gap: Annotated[float, Field(ge=0)]
    """Embedded data only: least difference between the mean human ratings of a pair, on the -4 to 4 scale."""


@dataclass(frozen=True, kw_only=True)
class RuleParams:
    """What a breach of each rule does; the rules are explained in `dpo.preferences.rules`.

    `quarantine` sets the row aside, `warn` only counts it, `error` stops the pipeline. Where nothing sound could
    be let through there is no `warn`. A completion that leaves no room for its prompt is always an error.
    """

    __pydantic_config__ = STRICT

    unreadable_row: Unpaired
    invalid_utf8: Unpaired
    lone_surrogate: Unpaired
    wrong_type: Unpaired
    missing_text: Unpaired
    broken_roles: Unpaired
    no_preference: Unpaired
    unknown_split: Unpaired
    empty_completion: Unpaired
    identical_completions: Unpaired
    duplicate_id: Unpaired
    control_characters: Action
    mojibake: Action
    special_tokens: Action
    prompt_truncated: Action
    duplicate_pair: Action
    near_duplicate_pair: Action
    contradiction: Action
    prompt_in_both_splits: Action
    eval_text_in_train: Action
    length_bias: Notice
    source_imbalance: Notice
    drift: Notice


@dataclass(frozen=True, kw_only=True)
class ValidateParams:
    """The contract that preference data must keep."""

    __pydantic_config__ = STRICT

    max_quarantined: Share
    """Largest share of rows that may be set aside; more stops the pipeline."""
    near_duplicate_similarity: Annotated[float, Field(gt=0, le=1)]
    """Least Jaccard similarity, of neighbouring words, of two pairs that count as one."""
    max_longer_share: Annotated[float, Field(ge=0.5, le=1)]
    """Largest share of pairs whose chosen, or whose rejected, completion is the longer one."""
    max_drift: Rate
    """Largest population stability index against the last committed version of the data."""
    rules: RuleParams


@dataclass(frozen=True, kw_only=True)
class EngineParams:
    """How text becomes log-probs; shared by every stage that runs the model."""

    __pydantic_config__ = STRICT

    max_length: Positive
    """Most tokens of prompt and one completion; prompts are cut from the left, completions never."""
    tokens_per_batch: Positive
    """Most tokens in one forward pass; bounds memory and leaves results unchanged."""
    precision: Precision
    """`fp32` is exact; `bf16` multiplies the layers' matrices in bfloat16, in cache and training alike. Weights
    and the vocabulary projection stay fp32; a GPU multiplies the latter in TF32."""
    compile: bool
    """Let `torch.compile` fuse what lies between matrix products: faster and leaner, once it has compiled, in some
    seconds of each stage. Needs a CUDA GPU and `bf16`."""


@dataclass(frozen=True, kw_only=True)
class OptimizerParams:
    """What SFT and DPO training share."""

    __pydantic_config__ = STRICT

    epochs: Positive
    """Passes over the training pairs."""
    pairs_per_step: Positive
    """Effective batch, in pairs."""
    optimizer: Literal["adamw", "rmsprop", "adamw_8bit", "paged_adamw_8bit"]
    """The paper's code uses RMSprop; AdamW is the common choice since. 8-bit states need a CUDA GPU."""
    schedule: Literal["linear", "cosine", "constant"]
    """Course of the learning rate after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of the steps, rounded down, in which the learning rate rises linearly; 0.1 in Tunstall et al. 2023,
    "Zephyr: Direct Distillation of LM Alignment", section 4."""
    max_grad_norm: Rate
    """Gradients are clipped to this norm; 10 in the paper's code."""
    gradient_checkpointing: bool
    """Keep fewer activations and compute them again in the backward pass: less memory, about a third more time."""
    non_finite: Literal["stop", "skip"]
    """What to do at a step whose loss or gradient is not finite; its pairs are kept for a look either way."""


@dataclass(frozen=True, kw_only=True)
class SftParams(OptimizerParams):
    """Supervised fine-tuning of the reference."""

    __pydantic_config__ = STRICT

    learning_rate: Rate
    """Peak learning rate."""
    completions: Literal["both", "chosen"]
    """Which side of each pair is imitated; both keep the reference neutral (Rafailov et al. 2023, section 6)."""
    max_pairs: Positive | None
    """Use the texts of at most this many training pairs; null uses all."""


@dataclass(frozen=True, kw_only=True)
class LoraParams:
    """Low-rank adapters on every linear layer but the output (Hu et al. 2021); dropout stays off."""

    __pydantic_config__ = STRICT

    rank: Positive
    """Inner dimension of each update."""
    alpha: Positive
    """Updates are scaled by alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopParams:
    """When to stop before the last epoch; the weights with the least validation loss are kept."""

    __pydantic_config__ = STRICT

    validation_share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the training pairs that is validated on instead; held-out pairs are never used."""
    every_steps: Positive
    """Steps between two validations."""
    patience: Positive
    """Validations in a row without a new best that end the training."""


@dataclass(frozen=True, kw_only=True)
class DpoParams(OptimizerParams):
    """Preference optimisation, the same for every cell of the sweep."""

    __pydantic_config__ = STRICT

    reference: Literal["cached", "online"]
    """`cached` holds one model; `online` computes reference log-probs in training: a second model, or LoRA off."""
    lora: LoraParams | None
    """Train adapters and save them alone; null trains all weights."""
    early_stop: EarlyStopParams | None
    """Null trains all epochs."""


@dataclass(frozen=True, kw_only=True)
class PlainLoss:
    """A loss without settings."""

    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class SmoothedLoss:
    """A loss that expects some labels to be wrong."""

    __pydantic_config__ = STRICT

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """Probability that chosen and rejected are the wrong way round."""


@dataclass(frozen=True, kw_only=True)
class RegularisedLoss:
    """A loss with the likelihood of chosen added."""

    __pydantic_config__ = STRICT

    sft_weight: Rate
    """Weight of the mean negative log-likelihood a token of the chosen completion."""


@dataclass(frozen=True, kw_only=True)
class PenalisedLoss:
    """A loss that keeps the likelihood of chosen from falling."""

    __pydantic_config__ = STRICT

    penalty: Rate
    """Weight of the nats that chosen has lost against the reference."""


@dataclass(frozen=True, kw_only=True)
class LossParams:
    """Settings of each loss; the equations are in `dpo.losses`."""

    __pydantic_config__ = STRICT

    sigmoid: PlainLoss
    ipo: PlainLoss
    conservative: SmoothedLoss
    robust: SmoothedLoss
    hinge: PlainLoss
    length_normalised: PlainLoss
    rpo: RegularisedLoss
    dpop: PenalisedLoss


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the sweep: one policy."""

    loss: LossName
    beta: float
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        """DVC's name of the cell, and the name of its files."""
        return f"{self.loss}-{self.beta}-{self.learning_rate}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class SweepParams:
    """Every combination of these is one policy."""

    __pydantic_config__ = STRICT

    losses: Annotated[tuple[LossName, ...], *Several]
    """Objectives, by name."""
    betas: Annotated[tuple[Positive | Rate, ...], *Several]
    """Strengths of the KL constraint, eq. 7."""
    learning_rates: Annotated[tuple[Rate, ...], *Several]
    """Peak learning rates."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], *Several]
    """Orders of the training pairs."""

    def cells(self) -> list[Cell]:
        """All policies, in DVC's order."""
        every = itertools.product(self.losses, self.betas, self.learning_rates, self.seeds)
        return [Cell(loss=loss, beta=beta, learning_rate=rate, seed=seed) for loss, beta, rate, seed in every]


@dataclass(frozen=True, kw_only=True)
class ScorerParams:
    """A judge that is a Python function."""

    __pydantic_config__ = STRICT

    kind: Literal["scorer"]
    function: str
    """`module:function` from prompts and answers to scores, higher is better."""


@dataclass(frozen=True, kw_only=True)
class RewardModelParams:
    """A judge that is a sequence classifier with one output."""

    __pydantic_config__ = STRICT

    kind: Literal["reward_model"]
    model: str
    """A folder under `models/own/`, or a hub id."""
    revision: str | None
    """Commit, tag or branch of a hub id; a hub id without one is refused."""


@dataclass(frozen=True, kw_only=True)
class LlmParams:
    """A judge that is asked over an OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY alone."""

    __pydantic_config__ = STRICT

    kind: Literal["llm"]
    model: str
    base_url: str
    """Such as https://api.openai.com/v1, or http://127.0.0.1:8000/v1 of a server of your own."""
    criterion: str
    """What makes an answer the better one, in a sentence that the judge is told."""
    parallel: Positive
    """Questions that are asked at once."""
    input_price: Annotated[float, Field(ge=0)]
    """Dollars per million tokens of questions."""
    output_price: Annotated[float, Field(ge=0)]
    """Dollars per million tokens of replies."""
    max_cost: Rate
    """Dollars that judging one policy may cost; before more would be spent, the stage stops."""


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
    judge: Annotated[ScorerParams | RewardModelParams | LlmParams, Field(discriminator="kind")] | None
    """Who compares answers; null leaves the win rate out."""


@dataclass(frozen=True, kw_only=True)
class SignParams:
    """Limits past which a figure is called a sign of failure."""

    __pydantic_config__ = STRICT

    max_displacement: Rate
    """Nats that the mean log-prob of chosen may fall against the reference."""
    max_perplexity_ratio: Rate
    """Perplexity of the held-out completions, over the reference's."""
    max_length_ratio: Rate
    """Tokens of an answer, over those of the reference's answers."""
    max_repetition_rise: Share
    """Share of repeated 4-grams in an answer, above the reference's."""
    min_distinct_ratio: Share
    """Share of distinct 2-grams among all of the answers, over the reference's."""
    max_empty: Share
    """Share of answers without a word."""
    max_unfinished_rise: Share
    """Share of answers cut off by `max_new_tokens`, above the reference's."""
    min_judged_gain: float
    """Judged gain over the reference; an interval wholly below it, while the implicit reward rises, is
    over-optimisation."""


@dataclass(frozen=True, kw_only=True)
class CompareParams:
    """How the comparison points out one policy: the highest `select` within `max_kl` and without a sign."""

    __pydantic_config__ = STRICT

    select: Literal["win_rate", "length_controlled_win_rate", "reward_accuracy", "margin"]
    """The figure to be highest."""
    max_kl: Rate
    """Nats an answer by which a policy may differ from its reference."""
    signs: SignParams


@dataclass(frozen=True, kw_only=True)
class RunParams:
    """How stages run. Results do not depend on it, so no stage does."""

    __pydantic_config__ = STRICT

    checkpoint_minutes: Annotated[float, Field(ge=0)]
    """Minutes of training that a kill may undo; 0 keeps a checkpoint of every step."""
    launch: str | None
    """A configuration of `accelerate launch` for the stages that run the model; null runs one process."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """The whole of `params.yaml`."""

    __pydantic_config__ = STRICT

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Seed of data, reference and answers; the training of policies has seeds of its own in `sweep`."""
    model: ModelParams
    data: DataParams
    validate: ValidateParams
    engine: EngineParams
    sft: SftParams
    dpo: DpoParams
    losses: LossParams
    sweep: SweepParams
    evaluate: EvaluateParams
    compare: CompareParams
    run: RunParams

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that leave room for an answer; of a longer one the beginning is cut."""
        return self.engine.max_length - self.evaluate.max_new_tokens


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check the parameters.

    Raises:
        InputError: one line for each fault: file, key, what is wrong.
    """
    try:
        text = path.read_text()
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(text)):
            raise YAMLError("an alias, as `*name`; write out what it stands for")
        values = YAML(typ="safe", pure=True).load(text)
        as_json = json.dumps(values, default=str)
    except (YAMLError, OSError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    _refuse_credentials(path, values)
    try:
        params: Params = TypeAdapter(Params).validate_json(as_json)
    except ValidationError as error:
        faults = [
            f"{path}: {'.'.join(str(part) for part in fault['loc']) or 'top level'}: {_words(fault)}"
            for fault in error.errors()
        ]
        raise InputError("\n".join(faults)) from error
    if params.evaluate.judge is None and "win_rate" in params.compare.select:
        raise InputError(
            f"{path}: compare.select: {params.compare.select} needs a judge; set evaluate.judge, or select "
            "reward_accuracy or margin"
        )
    if params.longest_prompt < 1:
        raise InputError(
            f"{path}: evaluate.max_new_tokens: {params.evaluate.max_new_tokens} leaves no room for a prompt in "
            f"engine.max_length, {params.engine.max_length}; lower it, or raise the other"
        )
    return params


def _refuse_credentials(path: Path, value: object, key: str = "") -> None:
    """Parameters are kept in git, MLflow and every checkpoint."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_credentials(path, inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            _refuse_credentials(path, inner, key)
    elif isinstance(value, str) and CREDENTIALS.search(value):
        raise InputError(
            f"{path}: {key}: an address with a user or a password in it; take them out and give them in the "
            "environment, as OPENAI_API_KEY or HF_TOKEN"
        )


def _words(fault: object) -> str:
    kind, message, given = fault["type"], fault["msg"], fault["input"]  # type: ignore[index]
    if kind == "unexpected_keyword_argument":
        return "unknown key; remove it or mend its name"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return "missing; add it"
    return f"{message[0].lower()}{message[1:]}, got {given!r}"
