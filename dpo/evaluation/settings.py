"""Settings of sampling, judging, guardrails and the choice of a policy."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from dpo.common.settings import Positive, Rate, Settings, Share


@dataclass(frozen=True, kw_only=True)
class ScorerSettings(Settings):
    """A judge that is a Python function."""

    kind: Literal["scorer"]
    function: str
    """`module:function` that maps prompts and responses to scores, higher is better."""


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings(Settings):
    """A judge that is a sequence classifier with one output."""

    kind: Literal["reward_model"]
    model: str
    """A folder under `models/own/`, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id. Required for a hub id."""


@dataclass(frozen=True, kw_only=True)
class LlmSettings(Settings):
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
    """Maximum cost in dollars of judging one policy. The stage stops before it would spend more."""


JudgeSettings = Annotated[ScorerSettings | RewardModelSettings | LlmSettings, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Sampling and judging on held-out prompts."""

    samples: Positive
    """Number of responses sampled from each policy and from the reference."""
    max_new_tokens: Positive
    """Maximum number of tokens of a response."""
    judge: JudgeSettings | None = None
    """Who compares responses; null leaves the win rate out."""


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
    max_unfinished_rise: Share = 0.25
    """Share of responses truncated at `max_new_tokens`, above the reference's."""
    min_judged_gain: float = 0.0
    """Judged gain over the reference. An interval entirely below it while the implicit reward rises is
    over-optimisation."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Settings):
    """How one policy is selected: the highest `select` within `max_kl` that no guardrail excludes."""

    select: Literal["win_rate", "length_controlled_win_rate", "reward_accuracy", "margin"]
    """The metric to maximise."""
    max_kl: Rate = 10.0
    """Maximum KL divergence from the reference, in nats per response."""
    guardrails: GuardrailSettings = field(default_factory=GuardrailSettings)
