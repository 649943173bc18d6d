"""Settings of the preference data and its validation."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, GetPydanticSchema
from pydantic_core.core_schema import literal_schema, typed_dict_field, typed_dict_schema

from dpo.common.settings import Positive, Rate, Settings, Share
from dpo.data.rules import RULES, Action

ACTIONS = typed_dict_schema(
    {name: typed_dict_field(literal_schema(list(rule.allowed)), required=False) for name, rule in RULES.items()},
    extra_behavior="forbid",
)
"""Schema of `validate.rules`. An error names the key, `validate.rules.NAME`."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Where preference pairs come from and how many are used."""

    source: str | Annotated[tuple[str, ...], Field(min_length=1)]
    """`default`, a file or folder (or a list of them) under `data/own/`, or the hub id of a data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub id. Required for a hub id."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns with other names, as `{prompt: question}`: a name in docs/guides/data.md, then yours."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = field(default_factory=dict)
    """Roles with other names, as `{customer: user}`."""
    split: str | tuple[str, ...] | None = None
    """Splits of a hub data set or of a folder to read; null reads all."""
    config: str | None = None
    """Configuration of a hub data set, if it has several."""
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

    @property
    def splits(self) -> tuple[str, ...]:
        """The names in `split`."""
        return (self.split,) if isinstance(self.split, str) else self.split or ()


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
    rules: Annotated[dict[str, Action], GetPydanticSchema(lambda *_: ACTIONS)] = field(default_factory=dict)
    """Action of a rule, by its name, if it is not the default in `dpo.data.rules`."""

    @property
    def actions(self) -> dict[str, Action]:
        """The action of every rule."""
        return {name: self.rules.get(name, rule.default) for name, rule in RULES.items()}
