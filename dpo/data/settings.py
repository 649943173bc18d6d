"""Settings of the preference data and its validation."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, GetPydanticSchema, Tag
from pydantic_core.core_schema import literal_schema, typed_dict_field, typed_dict_schema

from dpo.common.settings import Positive, Rate, Seed, Settings, Share
from dpo.common.settings import Several as SEVERAL
from dpo.data.rules import RULES, Action

ACTIONS = typed_dict_schema(
    {name: typed_dict_field(literal_schema(list(rule.allowed)), required=False) for name, rule in RULES.items()},
    extra_behavior="forbid",
)
"""Schema of `validate.rules`. An error names the key, `validate.rules.NAME`."""


@dataclass(frozen=True, kw_only=True)
class Source(Settings):
    """One of several sources of preference pairs."""

    path: str | None = None
    """File or folder under `data/own/`."""
    id: str | None = None
    """Hub id of a data set, instead of `path`."""
    revision: str | None = None
    """Commit, tag or branch of `id`."""
    split: str | tuple[str, ...] | None = None
    """Splits to read; null reads all."""
    config: str | None = None
    """Configuration of `id`, if it has several."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of its rows that is used, drawn at random with `seed`."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.id is None):
            raise ValueError("a source has either a path (file or folder) or an id (hub data set)")
        if (self.id is None) != (self.revision is None) or (self.id is None and self.config is not None):
            raise ValueError("an id needs a revision, and a path has neither a revision nor a config")

    @property
    def name(self) -> str:
        """The path below `data/own/`, or the id."""
        return self.id or str(self.path).removeprefix("data/own/")

    @property
    def splits(self) -> tuple[str, ...]:
        """The names in `split`."""
        return _names(self.split)


@dataclass(frozen=True, kw_only=True)
class ArithmeticSettings(Settings):
    """Problems of the source `arithmetic`."""

    problems: Positive = 1000
    """Number of distinct problems."""
    terms: Annotated[int, Field(ge=2, le=8)] = 3
    """Numbers in a problem."""
    digits: Annotated[int, Field(ge=1, le=4)] = 1
    """Maximum number of digits of a number."""
    operators: Annotated[tuple[Literal["+", "-", "*"], ...], *SEVERAL] = ("+", "-")
    """Operators between the numbers, drawn with equal probability."""


DISTANCE = 2**20
"""Distance of the seeds of two sets of reasoning problems, and the maximum number of problems of a set."""


@dataclass(frozen=True, kw_only=True)
class ReasoningSettings(Settings):
    """Problems of a source `reasoning_gym:NAME`."""

    problems: Annotated[int, Field(ge=2, le=DISTANCE)] = 1000
    """Number of problems. Those that occur twice are used once."""
    difficulty: dict[str, Any] = field(default_factory=dict)
    """Settings of the generator, as `{min_terms: 2, max_terms: 3}` of `chain_sum`."""


@dataclass(frozen=True, kw_only=True)
class ReasoningProblems(ReasoningSettings):
    """A generator of reasoning-gym with its settings."""

    generator: str
    """Name of the generator."""
    seed: Seed
    """Seed of the problems."""


def _names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()


def _tag(value: object) -> str:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list | tuple) else "<section>"


def _one_of(message: str) -> Discriminator:
    """Return the choice of a type by the kind of value, so that an error is about that type only."""
    return Discriminator(_tag, custom_error_type="kind", custom_error_message=message)


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("the list is empty")
    return values


Text = Annotated[str, Tag("<text>")]
Several = Annotated[
    tuple[
        Annotated[Text | Annotated[Source, Tag("<section>")], _one_of("Items should be names or sections")], ...
    ],
    AfterValidator(_not_empty),
    Tag("<list>"),
]


Sources = Annotated[Text | Several, _one_of("Input should be a name, or a list of names and sections")]
"""A name, or a list of names and sections."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Where preference pairs come from and how many are used."""

    source: Sources
    """`default`, `arithmetic`, `reasoning_gym:NAME`, a file or folder under `data/own/`, the hub id of a data set,
    or a list of files, folders and sections `{path or id, revision, split, config, share}`."""
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
    pair_labels: bool = False
    """Of rows with a label, make pairs of a desirable and an undesirable completion of the same prompt."""
    min_desirable_rating: float | None = None
    """Smallest number in `rating`, `score` or `stars` of a labelled row that is desirable; lower ones are not."""
    max_train_pairs: Positive | None = None
    """Maximum number of training pairs, drawn at random; null uses all."""
    max_eval_pairs: Positive | None = None
    """Maximum number of held-out pairs, drawn at random; null uses all."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts that is held out if the data has no `split` column."""
    min_rating_gap: Annotated[float, Field(ge=0)] = 2.0
    """Default data only: minimum difference between the mean human ratings of a pair, on a scale from -4 to 4."""
    arithmetic: ArithmeticSettings = field(default_factory=ArithmeticSettings)
    reasoning: ReasoningSettings = field(default_factory=ReasoningSettings)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names in `split`."""
        return _names(self.split)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The items of `source`. A text is a path, or the id of the only source."""
        items = (self.source,) if isinstance(self.source, str) else self.source
        return tuple(Source(path=item) if isinstance(item, str) else item for item in items)

    @property
    def origin(self) -> str:
        """The names in `source`, for messages."""
        return ", ".join(source.path or source.name for source in self.sources)


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
