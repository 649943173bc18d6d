"""Settings of the preference data and its validation."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from dpo.common.settings import Positive, Rate, Settings, Share

Action = Literal["error", "quarantine", "warn"]
RequiredAction = Literal["error", "quarantine"]
Notice = Literal["error", "warn"]


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Where preference pairs come from and how many are used."""

    source: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """`default`, a file or folder (or a list of them) under `data/own/`, or the hub id of a data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub id. Required for a hub id."""
    pairing: Literal["best_worst", "best_rest"] = "best_worst"
    """Of several rated completions of a prompt, pair the best with the worst, or the best with each other one."""
    max_train_pairs: Positive | None = None
    """Maximum number of training pairs, drawn at random; null uses all."""
    max_eval_pairs: Positive | None = None
    """Maximum number of held-out pairs, drawn at random; null uses all."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts that is held out if the data has no `split` column."""
    min_rating_gap: Annotated[float, Field(ge=0)] = 2.0
    """Default data only: minimum difference between the mean human ratings of a pair, on a scale from -4 to 4."""


@dataclass(frozen=True, kw_only=True)
class RuleSettings(Settings):
    """What happens to rows that break a rule. `dpo.data.rules` explains the rules.

    `quarantine` removes the row, `warn` counts it, `error` stops the pipeline. Rules without `warn` concern rows
    that cannot be used at all. A completion that leaves no room for its prompt is always an error.
    """

    unreadable_row: RequiredAction = "quarantine"
    invalid_utf8: RequiredAction = "quarantine"
    lone_surrogate: RequiredAction = "quarantine"
    wrong_type: RequiredAction = "quarantine"
    missing_text: RequiredAction = "quarantine"
    broken_roles: RequiredAction = "quarantine"
    no_preference: RequiredAction = "quarantine"
    unknown_split: RequiredAction = "quarantine"
    empty_completion: RequiredAction = "quarantine"
    identical_completions: RequiredAction = "quarantine"
    duplicate_id: RequiredAction = "quarantine"
    control_characters: Action = "quarantine"
    mojibake: Action = "quarantine"
    special_tokens: Action = "quarantine"
    prompt_truncated: Action = "warn"
    duplicate_pair: Action = "quarantine"
    near_duplicate_pair: Action = "quarantine"
    contradiction: Action = "quarantine"
    prompt_in_both_splits: Action = "quarantine"
    eval_text_in_train: Action = "quarantine"
    length_bias: Notice = "warn"
    source_imbalance: Notice = "warn"
    drift: Notice = "warn"


@dataclass(frozen=True, kw_only=True)
class ValidateSettings(Settings):
    """Limits of the data validation."""

    max_quarantined: Share = 0.1
    """Maximum share of quarantined rows; more stop the pipeline."""
    near_duplicate_similarity: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Minimum Jaccard similarity, over pairs of neighbouring words, of near duplicates."""
    max_longer_share: Annotated[float, Field(ge=0.5, le=1)] = 0.65
    """Maximum share of pairs in which the same side, chosen or rejected, is the longer one."""
    max_drift: Rate = 0.25
    """Maximum population stability index against the last committed version of the data."""
    rules: RuleSettings = field(default_factory=RuleSettings)
