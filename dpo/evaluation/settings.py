"""Settings of sampling, judges, guardrails and the selection of a policy."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dpo.common.settings import Positive, Rate, Settings, Share, one_error
from dpo.data.settings import ReasoningProblems

TRAINED_REWARD_MODELS = "models/rewards"
"""Folder of the models of the stage `reward_model`. Only `feedback` may use them."""
SHARED_REPLIES = "reports/replies.json"
"""Replies of paid judges by key, which the stage `compare` writes; `dvc push` and `dvc pull` exchange them."""


class _NamedJudge(Settings):
    @property
    def name(self) -> str:
        """Name in metrics and reports: the last part of the function's or model's name."""
        source: str = getattr(self, "function", "").rpartition(":")[2] or getattr(self, "model", "")
        return re.sub(r"[^\w.-]", "-", source.rstrip("/").rpartition("/")[2], flags=re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ScorerSettings(_NamedJudge):
    """A judge that is a Python function."""

    kind: Literal["scorer"]
    function: str
    """`module:function` that maps prompts and responses to scores, higher is better. Your module is in
    `functions/judges/`."""


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings(_NamedJudge):
    """A judge that is a sequence classifier with one output."""

    kind: Literal["reward_model"]
    model: str
    """A folder under `models/own/`, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id. Required for a hub id."""


@dataclass(frozen=True, kw_only=True)
class LlmSettings(_NamedJudge):
    """A judge behind an OpenAI-compatible endpoint. Its key is read from OPENAI_API_KEY only."""

    kind: Literal["llm"]
    model: str
    base_url: str
    """For example https://api.openai.com/v1, or http://127.0.0.1:8000/v1 for a local server."""
    criterion: str
    """One sentence that tells the judge what makes a response better."""
    parallel: Positive
    """Number of concurrent requests."""
    input_price: Annotated[float, Field(ge=0)]
    """Dollars per million tokens of requests."""
    output_price: Annotated[float, Field(ge=0)]
    """Dollars per million tokens of replies."""
    max_cost: Rate
    """Maximum cost in dollars of the replies that one stage uses, such as `evaluate@TRIAL`. Saved replies count,
    so that repeated runs do not spend more together. The stage stops before it would spend more."""


@dataclass(frozen=True, kw_only=True)
class VerifierSettings(Settings):
    """A judge that knows the answers: 1 if the last line is exactly `Answer: ` and the answer, else 0."""

    kind: Literal["verifier"]
    answers: str | None = None
    """Table under `data/own/` with the columns `prompt` and `answer`, as .parquet or .jsonl. Null computes the
    answer from the prompt of `data.source: arithmetic`."""
    problems: ReasoningProblems | None = None
    """Problems of reasoning-gym whose generator scores the answers. `data.source: reasoning_gym:NAME` sets it."""

    @property
    def name(self) -> str:
        """Name in metrics and reports."""
        return self.kind


JudgeSettings = Annotated[
    ScorerSettings | RewardModelSettings | LlmSettings | VerifierSettings, Field(discriminator="kind")
]


FeedbackSettings = Annotated[
    JudgeSettings,
    BeforeValidator(
        lambda value: {"kind": value, "model": TRAINED_REWARD_MODELS} if value == "reward_model" else value
    ),
]
"""`reward_model` alone is the model of the stage `reward_model`."""


def _distinct_names(judges: tuple[JudgeSettings, ...]) -> tuple[JudgeSettings, ...]:
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise ValueError(f"judges need different names, but their functions or models are named {names}")
    return judges


@dataclass(frozen=True, kw_only=True)
class TransformersSampler(Settings):
    """The stage samples in its own process, with the model that scores the responses."""

    kind: Literal["transformers"] = "transformers"


@dataclass(frozen=True, kw_only=True)
class VllmSampler(Settings):
    """The stage starts a vLLM server for the checkpoint, and stops it before it loads the model."""

    kind: Literal["vllm"]
    executable: str = "vllm"
    """Name or path of the command. vLLM may be in an environment of its own."""
    arguments: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Further arguments of `vllm serve`, as ["--tensor-parallel-size", "2"]."""
    start_minutes: Rate = 15
    """Maximum number of minutes until the server is ready."""
    parallel: Positive = 128
    """Number of concurrent requests."""


@dataclass(frozen=True, kw_only=True)
class OpenaiSampler(Settings):
    """An OpenAI-compatible server that you start. Its key is read from SAMPLER_API_KEY only."""

    kind: Literal["openai"]
    base_url: str
    """For example http://127.0.0.1:8000/v1."""
    model: str = "{name}"
    """Name of the model on the server. `{name}` becomes `reference` or the name of the trial."""
    parallel: Positive = 32
    """Number of concurrent requests."""


SamplerSettings = Annotated[
    TransformersSampler | VllmSampler | OpenaiSampler,
    Field(discriminator="kind"),
    BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value),
]


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Sampling and judging on held-out prompts."""

    samples: Positive
    """Number of responses sampled from each policy and from the reference."""
    kl_samples: Positive | None = 96
    """Number of these responses on which KL, entropy and implicit reward are measured, with the same share of each
    prompt. Null: all. Win rates need many responses, KL needs few."""
    prompts: str | None = None
    """File of prompts under `data/own/` to respond to; null: those of the held-out pairs. Accuracy and margins are
    measured on held-out pairs in both cases."""
    base_model: bool = True
    """Also compare with the base model, if supervised fine-tuning made another reference of it. False saves the
    time to sample its responses, and the cost of paid judges."""
    max_new_tokens: Annotated[Positive | Literal["auto"], one_error("must be auto or an integer above 0")]
    """Maximum number of tokens of a response. `auto` is the 95% quantile of the held-out completions, but at most
    three quarters of `engine.max_length`."""
    max_tokens_per_batch: Positive = 16_384
    """Maximum number of tokens of prompts and responses that are sampled together. Halved if memory runs out."""
    sampler: SamplerSettings = field(default_factory=TransformersSampler)
    """What samples the responses: `transformers`, `vllm`, or a section. The engine scores them in every case."""
    judges: Annotated[tuple[JudgeSettings, ...], AfterValidator(_distinct_names)] = ()
    """Judges of responses. The first one decides win rate, guardrails, selection and promotion; the win rate of
    each further one is reported as `win_rate/NAME`. An empty list leaves the win rate out."""


def _one_file_per_task(tasks: tuple[str, ...]) -> tuple[str, ...]:
    for task in tasks:
        if not re.fullmatch(r"[\w.-]+", task) or tasks.count(task) > 1:
            raise ValueError(f"names of tasks must differ and have no '/' and no space: {task!r}")
    return tasks


@dataclass(frozen=True, kw_only=True)
class CapabilitiesSettings(Settings):
    """Benchmark tasks of lm_eval on the selected policy, the reference and the base model."""

    tasks: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_one_file_per_task)] = ()
    """Names of tasks of lm_eval, or of YAML tasks in `data/own/capabilities/`. The first metric of a task with one
    number per example counts. An empty list removes the stage."""
    examples: Positive | None = None
    """Number of examples of each task, or of each part of a group; null: all."""


@dataclass(frozen=True, kw_only=True)
class GuardrailSettings(Settings):
    """Limits of metrics. A policy beyond a limit is not selected."""

    max_displacement: Rate = 15.0
    """Nats that the mean log-prob of chosen may fall against the reference."""
    max_perplexity_ratio: Rate = 2.0
    """Perplexity of the held-out completions, divided by the reference's."""
    max_length_ratio: Rate = 1.5
    """Tokens of a response, divided by those of the reference's responses."""
    max_repetition_rise: Share = 0.1
    """Share of repeated 4-grams in a response, above the reference's."""
    min_distinct_ratio: Share = 0.7
    """Share of distinct 2-grams in all responses, divided by the reference's."""
    max_empty: Share = 0.02
    """Share of responses without a visible character."""
    max_unfinished: Share = 0.5
    """Share of responses truncated at `max_new_tokens`, of the policy and of the reference."""
    max_unfinished_rise: Share = 0.25
    """Share of responses truncated at `max_new_tokens`, above the reference's."""
    max_loss_rise: float = 0.0
    """Held-out loss, above the loss at step 0, when the policy equals the reference."""
    min_kl: Annotated[float, Field(ge=0)] = 0.01
    """KL divergence from the reference, in nats per response. By Pinsker's inequality, a policy below 0.01 has a
    win rate of at most 0.57."""
    max_unchanged: Share = 0.95
    """Share of responses that equal the reference's response to the same prompt."""
    max_capability_drop: Rate = 0.05
    """Fall of the metric of a task of `capabilities` below the reference's. A policy beyond it is not promoted."""
    min_judged_gain: float = 0.0
    """Judged gain over the reference. An interval entirely below it while the margin is positive is
    over-optimisation."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """How one policy is selected among those within `max_kl` and all guardrails."""

    select: Literal["win_rate", "length_controlled_win_rate", "reward_accuracy", "margin"]
    """The metric to maximise."""
    ties: Literal["least_kl", "highest"] = "least_kl"
    """Which policy to select of those that the paired test does not separate from the best one."""
    max_kl: Rate = 10.0
    """Maximum KL divergence from the reference, in nats per response."""
    guardrails: GuardrailSettings = field(default_factory=GuardrailSettings)


@dataclass(frozen=True, kw_only=True)
class PromoteSettings(Settings):
    """The gate of `dpo promote`."""

    samples: Positive | None = None
    """Number of responses of the policy and of its opponent that the gate compares; null is `evaluate.samples`."""
    error_rate: Annotated[float, Field(gt=0, lt=0.5)] = 0.025
    """Maximum probability of promoting a policy that equals the champion, over `nights` comparisons."""
    nights: Positive = 30
    """Comparisons with one champion that share `error_rate`. Earlier ones may use more of it."""
