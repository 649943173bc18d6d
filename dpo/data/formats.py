"""Conversion of a row to canonical pairs.

The layout of a row is detected from its fields (`dpo.data.layouts`); a row that fits none is read in the layout of
most rows of its file. A row is read completely or not used: one that cannot be converted, or that has content in a
field that is not read, raises `RowError` with the rule that it breaks.
"""

import datetime
import hashlib
import math
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo.common.errors import InputError
from dpo.data.demonstrations import DEMONSTRATIONS
from dpo.data.labels import LABELLED
from dpo.data.layouts import LAYOUTS, Layout
from dpo.data.reading import (
    ANY_PROMPT,
    CONVERSATIONS,
    SYSTEMS,
    TOOLS,
    VARIABLES,
    Example,
    Reading,
    number,
    read_template_kwargs,
    read_tools,
    same,
)
from dpo.data.turns import ROLES, Fields, RowError, Turn, content_text, shown, storable, transcript

Row = Mapping[str, Any]
Pair = dict[str, Any]
Pairing = Literal["best_worst", "best_rest"]

COMPLETIONS = ("chosen", "rejected")
PAIR_TEXTS = ("prompt", *COMPLETIONS)
"""The texts of a canonical pair."""
CONTENT_FIELDS = frozenset(
    (
        *ANY_PROMPT, *SYSTEMS, *TOOLS, *VARIABLES, "article", "audio", "audios", "background", "chat_history",
        "chosen_reasoning", "contexts", "custom_system_prompt", "demonstrations", "document", "documents",
        "evidence", "few_shot", "history", "image", "images", "inputs", "knowledge", "objects", "passage",
        "passages", "rejected_reasoning", "retrieved_contexts", "retrieved_documents", "search_results",
        "video", "videos",
    )
)  # fmt: skip
"""Fields that are known to carry content. A row with a value in one that is not read is not used."""
RATINGS = {
    "chosen_rating": ("score_chosen", "chosen_score", "chosen-rating"),
    "rejected_rating": ("score_rejected", "rejected_score", "rejected-rating"),
}
"""Other names of the ratings."""
OF_PAIRS = ("agreement", *RATINGS)
"""Optional fields that only pairs have."""
PLAIN_FIELDS = frozenset(PAIR_TEXTS)
MARKED = ("[", "{", "Human:")
"""Starts of texts that may be conversations."""
NO_OPTIONS: Mapping[str, None] = dict.fromkeys(
    (
        *("turns", "chosen_turns", "rejected_turns", "tools", "chat_template_kwargs"),
        *("split", "source", "weight", "agreement", *RATINGS),
    )
)
SPLITS = {"train": "train"} | dict.fromkeys(("eval", "test", "validation", "valid", "dev"), "eval")
LEFT_OUT = "more than two completions; data.pairing: best_worst uses two"
PARTS = ("content", "message", "parts", "text", "value")
"""Keys inside of fields that carry content, besides the names of such fields."""
BEST_COMPLETION = "rows have several completions; the best one is used"
REPEATED_PROMPT = "completions start with their prompt; it was removed"


@dataclass(frozen=True)
class Spelling:
    """How a source names its columns and roles, and which of several completions are paired."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """The source's column by the name that layouts read."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Roles in addition to `dpo.data.turns.ROLES`."""
    pairing: Pairing = "best_worst"
    single: bool = False
    """Whether rows are demonstrations, with one completion. Of several, the best one is used."""
    min_desirable_rating: float | None = None
    """Smallest number that is a desirable rating of a labelled row."""

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Layouts that the rows may have, by name."""
        return LAYOUTS | (DEMONSTRATIONS if self.single else LABELLED)

    def fields(self, row: Row, *, keep_empty: bool = False) -> Fields:
        """Return the fields of a row by the names that layouts read."""
        if self.columns:
            names = {theirs: ours for ours, theirs in self.columns.items()}
            row = {names.get(name, name): value for name, value in row.items() if name not in self.columns}
        return Fields(row, keep_empty=keep_empty)


@dataclass(frozen=True)
class Converted:
    """The pairs of a row, and what was not read or was removed."""

    pairs: list[Pair]
    layout: str
    unread: list[str]
    """Fields with a value that were not read."""
    notes: list[str]
    """What was removed from the texts."""

    @property
    def is_labelled(self) -> bool:
        """Whether the row has one completion with a label."""
        return self.layout in LABELLED


def layout_of(row: Row, spelling: Spelling) -> str | None:
    """Return the layout of a row, a key of `LAYOUTS`, or None."""
    # An empty text is not missing if the row fits no layout without it.
    return _layout(spelling.fields(row), spelling) or _layout(spelling.fields(row, keep_empty=True), spelling)


def _layout(fields: Fields, spelling: Spelling) -> str | None:
    return next((name for name, layout in spelling.layouts.items() if layout.needs(fields)), None)


def detect(rows: Collection[Row], origin: str, spelling: Spelling) -> str:
    """Return the most frequent layout of some rows of the file `origin`.

    Raises:
        InputError: no row has a known layout.
    """
    found = [name for row in rows if (name := layout_of(row, spelling))]
    if found:
        return max(spelling.layouts, key=found.count)
    fields = {str(name) for row in rows for name in row}
    for needed, problem, fix in (
        (
            {"prompt", "response", "helpfulness"},
            "rows with one 'response' and its ratings, as in HelpSteer2",
            "combine the rows of a prompt: table.groupby('prompt').agg(completions=('response', list), "
            "scores=('helpfulness', list)).reset_index()",
        ),
    ):
        if needed <= fields:
            raise InputError(f"{origin}: {problem}; {fix}")
    raise InputError(
        f"{origin}: unknown layout (found {', '.join(map(repr, sorted(fields))) or 'no field'}); each row needs "
        "'prompt', 'chosen' and 'rejected', or one of the layouts in docs/guides/data.md; name other columns in "
        "data.columns"
    )


def convert(row: Row, spelling: Spelling, usual_layout: str) -> Converted:
    """Return the pairs of one row. `usual_layout` is read if the row fits no layout.

    Raises:
        RowError: the row cannot be converted, or has content that is not read.
    """
    if not (spelling.columns or spelling.single) and (pair := _plain(row)):
        return Converted([pair], "pairs", [], [])
    fields = spelling.fields(row)
    name = _layout(fields, spelling) or layout_of(row, spelling) or usual_layout
    roles = {**ROLES, **spelling.roles} if spelling.roles else ROLES
    reading = Reading(fields, roles, min_desirable_rating=spelling.min_desirable_rating)
    example = spelling.layouts[name].read(reading)
    shared = _metadata(fields, OF_PAIRS if name not in LABELLED else ())
    shared["tools"] = read_tools(fields.get(*TOOLS) or reading.tools)
    shared["chat_template_kwargs"] = read_template_kwargs(fields.get(*VARIABLES))
    if name in LABELLED or spelling.single:
        pairs = [_single(example, reading, COMPLETIONS[not (spelling.single or example.scores[0])])]
    else:
        pairs = _pairs(example, reading, spelling.pairing)
    _check_unread_content(fields, reading)
    label = shared.pop("id")
    for place, pair in enumerate(pairs):
        pair |= {key: value for key, value in shared.items() if pair.get(key) is None}
        if label:
            pair["id"] = label if len(pairs) == 1 else f"{label}/{place}"
        else:
            texts = [pair[text] or "" for text in PAIR_TEXTS]
            texts += [str(shared[name]) for name in ("tools", "chat_template_kwargs") if shared[name]]
            pair["id"] = hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:16]
    return Converted(pairs, name, sorted({*fields.unread(), *reading.unread}), sorted(reading.notes))


def _plain(row: Row) -> Pair | None:
    """Return the pair of a row of three plain texts, as most rows are, or None for any other row.

    The result is that of the general conversion, which takes longer.
    """
    if row.keys() != PLAIN_FIELDS:
        return None
    texts: list[Any] = [row[field] for field in PAIR_TEXTS]
    if not all(isinstance(text, str) and text and not text.lstrip().startswith(MARKED) for text in texts):
        return None
    prompt, chosen, rejected = texts
    asked, joined = prompt.strip(), "\x1f".join(texts)
    if asked and chosen.lstrip().startswith(asked) and rejected.lstrip().startswith(asked):
        return None
    try:
        label = hashlib.sha256(joined.encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        return None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **NO_OPTIONS, "id": label}


def normalize(text: str) -> str:
    """Return a text without differences of case, white space and Unicode compatibility forms."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def _pairs(example: Example, reading: Reading, pairing: Pairing) -> list[Pair]:
    """Pair the best completion with the worst, or with each one that has a lower score."""
    scores = example.scores
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    lower = [place for place in order if scores[place] < scores[order[0]]]
    if len(lower) > 1 and pairing == "best_worst":
        reading.notes.add(LEFT_OUT)
    if not lower:
        raise RowError("no_preference", f"{len(scores)} completions, none rated higher than another")
    best, prompt = order[0], example.prompt
    if example.systems and (system := example.systems[best]):  # the answer that is learned was given under it
        prompt = [{"role": "system", "content": system}, *prompt]
    made = []
    for other in lower[-1:] if pairing == "best_worst" else lower:
        pair = _pair(prompt, example.completions[best], example.completions[other], reading)
        ratings = zip(RATINGS, (scores[best], scores[other]), strict=True)
        made.append(pair | (dict(ratings) if example.is_rating else {}))
    return made


def _pair(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn], reading: Reading) -> Pair:
    """Return the canonical pair of two completions, each of which may be a whole conversation."""
    ours, theirs = (
        _conversation(prompt, turns, name) for name, turns in zip(COMPLETIONS, (chosen, rejected), strict=True)
    )
    for name, turns in zip(COMPLETIONS, (ours, theirs), strict=True):
        if not turns or turns[-1]["role"] != "assistant":
            raise RowError("broken_roles", f"field '{name}' does not end with an assistant turn")
    longest = min(len(ours), len(theirs)) - 1
    parting = next((place for place in range(longest) if not same(ours[place], theirs[place])), longest)
    if {ours[parting]["role"], theirs[parting]["role"]} != {"assistant"}:
        raise RowError(
            "broken_roles", f"the conversations part at a turn of the {_other_role(ours, theirs, parting)}"
        )
    before, tails = ours[:parting], [ours[parting:], theirs[parting:]]
    reading.conversations += [before, ours, theirs]
    if reading.is_transcript:
        tails = [[{**turn, "content": turn["content"].strip()} for turn in tail] for tail in tails]
    tails = _without_prompt(before, tails, reading.notes)
    texts = zip(COMPLETIONS, ("\n\n".join(map(content_text, tail)) for tail in tails), strict=True)
    kept = {
        f"{name}_turns": None if _is_text(tail) else tail for name, tail in zip(COMPLETIONS, tails, strict=True)
    }
    return {**prompt_fields(before, reading.is_transcript), **dict(texts), **kept}


def _single(example: Example, reading: Reading, side: str) -> Pair:
    """Return the best completion as the only one of a row, in the field `side`.

    Of a conversation that is one completion, every answer is learned.
    """
    best = max(range(len(example.scores)), key=example.scores.__getitem__)  # the first one of equals
    if len(example.scores) > 1:
        reading.notes.add(BEST_COMPLETION)
    prompt = example.prompt
    if example.systems and (system := example.systems[best]):
        prompt = [{"role": "system", "content": system}, *prompt]
    turns = _conversation(prompt, example.completions[best], "completion")
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("broken_roles", "the conversation does not end with an assistant turn")
    continues = prompt and example.completions[best][0]["role"] == "assistant"
    start = len(prompt) if continues else next(i for i, t in enumerate(turns) if t["role"] == "assistant")
    tail = turns[start:]
    reading.conversations += [turns[:start], turns]
    if reading.is_transcript:
        tail = [{**turn, "content": turn["content"].strip()} for turn in tail]
    (tail,) = _without_prompt(turns[:start], [tail], reading.notes)
    return {
        **prompt_fields(turns[:start], reading.is_transcript),
        **dict.fromkeys((*COMPLETIONS, *(f"{name}_turns" for name in COMPLETIONS))),
        side: "\n\n".join(map(content_text, tail)),
        f"{side}_turns": None if _is_text(tail) else tail,
    }


def _other_role(ours: Sequence[Turn], theirs: Sequence[Turn], place: int) -> str:
    return next(turns[place]["role"] for turns in (ours, theirs) if turns[place]["role"] != "assistant")


def _conversation(prompt: list[Turn], completion: list[Turn], name: str) -> list[Turn]:
    """Return the whole conversation of a completion, which may start with the prompt, or with turns before it."""
    if not completion or completion[0]["role"] == "assistant":
        return prompt + completion
    system = prompt[:1] if prompt and prompt[0]["role"] == "system" else []
    asked = prompt[len(system) :]
    if system and completion[0]["role"] != "system":
        completion = system + completion
    rest = completion[1:] if completion[0]["role"] == "system" else completion
    starts = len(asked) <= len(rest) and all(map(same, asked, rest))
    asks = len(asked) == 1 and any(same(asked[0], turn) for turn in rest)
    if (system and not same(system[0], completion[0])) or not (starts or asks):
        raise RowError("broken_roles", f"field 'prompt' differs from the start of the conversation in '{name}'")
    return completion


def _without_prompt(before: list[Turn], tails: list[list[Turn]], notes: set[str]) -> list[list[Turn]]:
    """Remove the prompt's text from the start of both completions if they repeat it."""
    asked = before[-1]["content"].strip() if before else ""
    first = [tail[0]["content"].lstrip() for tail in tails]
    if not asked or not all(text.startswith(asked) and text[len(asked) :].strip() for text in first):
        return tails
    notes.add(REPEATED_PROMPT)
    rests = [text[len(asked) :].lstrip() for text in first]
    return [[{**tail[0], "content": rest}, *tail[1:]] for tail, rest in zip(tails, rests, strict=True)]


def _is_text(tail: list[Turn]) -> bool:
    """Return whether a completion is one text of the assistant, without reasoning and tool calls."""
    return len(tail) == 1 and tail[0].keys() == {"role", "content"}


def prompt_fields(turns: list[Turn], is_transcript: bool) -> Pair:
    """Return the prompt fields for the turns before the answer. A single user turn is a plain prompt."""
    roles = [turn["role"] for turn in turns]
    if not turns or roles[-1] not in ("user", "tool") or "user" not in roles or "system" in roles[1:]:
        found = ", ".join(roles) or "none"
        raise RowError("broken_roles", f"the prompt's roles are {found}; it must end with the user or a tool")
    if is_transcript:
        return {"prompt": f"\n\n{transcript(turns, 'Human')}", "turns": turns}
    if roles == ["user"]:
        return {"prompt": turns[0]["content"], "turns": None}
    return {"prompt": transcript(turns), "turns": turns}


def _check_unread_content(fields: Fields, reading: Reading) -> None:
    """Raise RowError if a field that carries content was not read. A copy of a conversation is not content."""
    fix = "name it in data.columns if it is the prompt, or remove the field"
    for name in set(fields.unread()) & CONTENT_FIELDS:
        value = fields.peek(name)
        if name in CONVERSATIONS and isinstance(value, str | list) and reading.is_copy(value, name):
            fields.get(name)
            continue
        raise RowError("unread_content", f"field '{name}' has content that is not read: {shown(value)}; {fix}")
    inner = {name for name in reading.unread if name.rpartition(".")[2] in CONTENT_FIELDS | set(PARTS)}
    if inner:
        raise RowError("unread_content", f"field '{min(inner)}' has content that is not read; remove the field")


def _metadata(fields: Fields, of_pairs: Collection[str]) -> Pair:
    """Return the optional fields. A value of another type is left unread, so that it is reported.

    `of_pairs` are the numbers that the row may have besides its weight.
    """
    split = fields.get("split")
    name = split.replace("-", "_").split("_")[0] if isinstance(split, str) else None
    if split is not None and name not in SPLITS:
        raise RowError("unknown_split", f"split {shown(split)} is not one of {', '.join(SPLITS)}")
    checks = {"agreement": lambda value: 0 <= value <= 1, **dict.fromkeys(RATINGS, math.isfinite)}
    numbers = {
        name: _number(fields, check, name, *RATINGS.get(name, ())) if name in of_pairs else None
        for name, check in checks.items()
    }
    numbers["weight"] = _number(fields, lambda value: value > 0, "weight")
    labels = {name: _label(fields, name) for name in ("id", "source")}
    return {**labels, **numbers, "split": name and SPLITS[name]}


def _label(fields: Fields, name: str) -> str | None:
    if name not in fields:
        return None
    value = fields.peek(name)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if isinstance(value, datetime.date):
        value = value.isoformat()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        label = storable(str(value), name)
    except RowError:
        return None
    fields.get(name)
    return label


def _number(fields: Fields, is_valid: Any, *names: str) -> float | None:
    for name in filter(fields.__contains__, names):
        try:
            value = number(fields.peek(name), name)
        except RowError:
            continue
        if is_valid(value):
            fields.get(name)
            return value
    return None
