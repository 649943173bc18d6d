"""Accepted formats of preference data, and the conversion of a row to canonical pairs.

Each format is a function from a row (a mapping, as parsed from JSON) to pairs. The format of a source is detected
from its first rows. A row that cannot be converted raises `RowError` with the rule that it breaks.
"""

import datetime
import hashlib
import math
import re
import reprlib
import unicodedata
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from dpo.common.errors import InputError

Row = Mapping[str, Any]
Pair = dict[str, Any]
Turn = dict[str, str]
Pairing = Literal["best_worst", "best_rest"]

COMPLETIONS = ("chosen", "rejected")
PAIR_TEXTS = ("prompt", *COMPLETIONS)
"""The texts of a canonical pair."""

PROMPTS = ("prompt", "instruction")
TEXTS = ("response", "text", "content", "completion")
SCORES = ("score", "overall_score", "rating")
SCORE_LISTS = ("scores", "ratings")
RANK_LISTS = ("ranks", "rankings")
SPLITS = {"train": "train"} | dict.fromkeys(("eval", "test", "validation", "valid", "dev"), "eval")
ROLES = ("system", "user", "assistant")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ANSWER = "\n\nAssistant:"
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(Exception):
    """A row cannot be converted to pairs. `rule` is the rule that it breaks, `reason` says how."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule, self.reason = rule, reason


def detect(rows: Collection[Row], origin: str) -> str:
    """Return the format of a source, a key of `FORMATS`: the most frequent one among the given rows.

    Raises:
        InputError: no row has a known format, or the data is unpaired.
    """
    found = [name for row in rows if (name := _detect_row(row))]
    if found:
        return max(FORMATS, key=found.count)
    fields = sorted({str(field) for row in rows for field in row})
    if {"completion", "label"} <= set(fields):
        raise InputError(
            f"{origin}: rows with 'completion' and 'label' are unpaired data for KTO; DPO needs pairs; "
            "combine a good and a bad completion of each prompt as 'chosen' and 'rejected'"
        )
    raise InputError(
        f"{origin}: unknown format (found {', '.join(map(repr, fields)) or 'no field'}); each row needs "
        "'prompt', 'chosen' and 'rejected', or 'chosen' and 'rejected' as conversations or Human/Assistant "
        "transcripts, or 'prompt' and scored 'completions', or 'prompt', 'responses' and 'scores' or 'ranks'"
    )


def _detect_row(row: Row) -> str | None:
    has_prompt = any(field in row for field in PROMPTS)
    if "chosen" in row and "rejected" in row:
        if has_prompt:
            return "pairs"
        if isinstance(row["chosen"], str):
            return "transcripts" if HH_TURN.search(f"\n\n{row['chosen']}") else None
        return "conversations"
    if has_prompt and "completions" in row:
        return "scored completions"
    if has_prompt and "responses" in row and any(field in row for field in (*SCORE_LISTS, *RANK_LISTS)):
        return "rated responses"
    return None


def to_pairs(row: Row, form: str, pairing: Pairing) -> list[Pair]:
    """Return the pairs of one row: `prompt`, `turns`, `chosen`, `rejected` and the optional fields.

    `form` is from `detect`. Of several rated completions, `pairing` combines the best with the worst, or with each
    lower-rated one. A row that cannot be converted raises RowError.
    """
    pairs = FORMATS[form](row, pairing)
    shared = _optional_fields(row)
    name = shared.pop("id")
    for number, pair in enumerate(pairs):
        for field in PAIR_TEXTS:
            _storable(pair[field], field)
        pair |= {k: v for k, v in shared.items() if pair.get(k) is None}
        if name:
            pair["id"] = name if len(pairs) == 1 else f"{name}/{number}"
        else:
            pair["id"] = hashlib.sha256("\x1f".join(pair[f] for f in PAIR_TEXTS).encode()).hexdigest()[:16]
    return pairs


def normalize(text: str) -> str:
    """Return a text without differences of case, white space and Unicode compatibility forms."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def _pairs(row: Row, pairing: Pairing) -> list[Pair]:
    prompt, chosen, rejected = _prompt(row), _required(row, "chosen"), _required(row, "rejected")
    if all(isinstance(value, list) and len(value) > 1 for value in (chosen, rejected)):
        pair = _conversation(_turns(chosen, "chosen"), _turns(rejected, "rejected"))
        text = _prompt_fields(prompt)["prompt"]
        openings = [pair["prompt"], *(turn["content"] for turn in (pair["turns"] or [])[-1:])]
        if text.strip() not in [opening.strip() for opening in openings]:
            raise RowError("broken_roles", "field 'prompt' differs from the start of the conversations")
        return [pair]
    completions = {field: _completion(row[field], field) for field in COMPLETIONS}
    return [{**_prompt_fields(prompt), **completions}]


def _conversations(row: Row, pairing: Pairing) -> list[Pair]:
    return [_conversation(*(_turns(_required(row, field), field) for field in COMPLETIONS))]


def _transcripts(row: Row, pairing: Pairing) -> list[Pair]:
    chosen, rejected = (_parse_transcript(_text(_required(row, field), field), field) for field in COMPLETIONS)
    pair = _conversation(chosen, rejected)
    opening = row["chosen"].rpartition(HH_ANSWER)[0] + HH_ANSWER
    return [{**pair, "prompt": opening, "turns": chosen[:-1]}]


def _scored_completions(row: Row, pairing: Pairing) -> list[Pair]:
    texts, scores = [], []
    for completion in _listed(_required(row, "completions"), "completions"):
        if not isinstance(completion, Mapping):
            raise RowError("wrong_type", "field 'completions' contains an item that is not an object")
        text = next((completion[field] for field in TEXTS if field in completion), None)
        score = next((completion[field] for field in SCORES if completion.get(field) is not None), None)
        texts.append(_text(text, "completions"))
        scores.append(_required_number(score, "completions: score"))
    return _ranked_pairs(row, texts, scores, pairing)


def _rated_responses(row: Row, pairing: Pairing) -> list[Pair]:
    texts = [_text(text, "responses") for text in _listed(_required(row, "responses"), "responses")]
    field = next(f for f in (*SCORE_LISTS, *RANK_LISTS) if f in row or f == RANK_LISTS[-1])
    values = [_required_number(value, field) for value in _listed(_required(row, field), field)]
    if len(values) != len(texts):
        raise RowError("wrong_type", f"{len(texts)} responses have {len(values)} {field}")
    if field not in RANK_LISTS:
        return _ranked_pairs(row, texts, values, pairing)
    no_rating = {"chosen_rating": None, "rejected_rating": None}  # a rank is not a rating
    return [pair | no_rating for pair in _ranked_pairs(row, texts, [-value for value in values], pairing)]


def _ranked_pairs(row: Row, texts: list[str], scores: list[float], pairing: Pairing) -> list[Pair]:
    prompt = _prompt_fields(_prompt(row))
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    lower = [i for i in order if scores[i] < scores[order[0]]]
    if not lower:
        raise RowError("no_preference", f"{len(texts)} completions, none rated higher than another")
    best = {**prompt, "chosen": texts[order[0]], "chosen_rating": scores[order[0]]}
    worse = lower[-1:] if pairing == "best_worst" else lower
    return [{**best, "rejected": texts[i], "rejected_rating": scores[i]} for i in worse]


FORMATS: dict[str, Callable[[Row, Pairing], list[Pair]]] = {
    "pairs": _pairs,
    "conversations": _conversations,
    "transcripts": _transcripts,
    "scored completions": _scored_completions,
    "rated responses": _rated_responses,
}


def _conversation(chosen: list[Turn], rejected: list[Turn]) -> Pair:
    """Return the pair of two conversations that differ in the last turn only. The other turns are the prompt."""
    for turns, field in zip((chosen, rejected), COMPLETIONS, strict=True):
        if not turns or turns[-1]["role"] != "assistant":
            raise RowError("broken_roles", f"field '{field}' does not end with an assistant turn")
    if chosen[:-1] != rejected[:-1]:
        raise RowError("broken_roles", "the conversations differ before their last turn")
    pair = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    return {**_conversation_prompt(chosen[:-1]), **pair}


def _prompt_fields(prompt: Any) -> Pair:
    if isinstance(prompt, str):
        return {"prompt": prompt, "turns": None}
    return _conversation_prompt(_turns(prompt, "prompt"))


def _conversation_prompt(turns: list[Turn]) -> Pair:
    """Return the prompt fields for the turns before the answer. A single user turn is a plain prompt."""
    roles = [turn["role"] for turn in turns]
    rest = roles[1:] if roles[:1] == ["system"] else roles
    if rest != [*["user", "assistant"] * (len(rest) // 2), "user"]:
        found = ", ".join(roles) or "none"
        raise RowError(
            "broken_roles", f"the prompt's roles are {found}; user and assistant must alternate, user last"
        )
    if roles == ["user"]:
        return {"prompt": turns[0]["content"], "turns": None}
    text = "".join(f"\n\n{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    return {"prompt": f"{text.lstrip()}{HH_ANSWER}", "turns": turns}


def _turns(value: Any, field: str) -> list[Turn]:
    turns = []
    for turn in _listed(value, field):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            reason = f"field '{field}' contains an item that is not a turn with 'role' and 'content'"
            raise RowError("wrong_type", reason)
        if turn["role"] not in ROLES:
            reason = f"field '{field}': unknown role {_shown(turn['role'])}, expected {', '.join(ROLES)}"
            raise RowError("broken_roles", reason)
        turns.append({"role": turn["role"], "content": _storable(_text(turn["content"], field), field)})
    return turns


def _parse_transcript(text: str, field: str) -> list[Turn]:
    parts = HH_TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if parts[0].strip() or len(parts) == 1:
        raise RowError("broken_roles", f"field '{field}' does not start with 'Human:'")
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": HH_ROLES[role], "content": content.strip()} for role, content in turns]


def _completion(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    turns = _turns(value, field)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise RowError("broken_roles", f"field '{field}' must contain exactly one assistant turn")
    return turns[0]["content"]


def _prompt(row: Row) -> Any:
    field = next((f for f in PROMPTS if row.get(f) is not None), "prompt")
    prompt = _required(row, field)
    return prompt if isinstance(prompt, str) else _listed(prompt, field)


def _required(row: Row, field: str) -> Any:
    if row.get(field) is None:
        raise RowError("missing_text", f"field '{field}' is missing or null")
    return row[field]


def optional(row: Row, field: str) -> Any:
    """Return the value of an optional field. An empty string or NaN, which tables use for no value, gives None."""
    value = row.get(field)
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def _shown(value: Any) -> str:
    """Return the start of a value for a message. Works for large and deeply nested values."""
    return repr((value if isinstance(value, str) else reprlib.repr(value))[:40])


def _text(value: Any, field: str) -> str:
    if value is None:
        raise RowError("missing_text", f"field '{field}' contains null instead of a text")
    if not isinstance(value, str):
        raise RowError("wrong_type", f"field '{field}' is {type(value).__name__} {_shown(value)}, not a text")
    return value


def _listed(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError("wrong_type", f"field '{field}' is {type(value).__name__}, not a text or a list")
    return value


def _storable(text: str, field: str) -> str:
    """Return the text, or raise RowError if it cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            raise RowError("invalid_utf8", f"field '{field}': byte {code - 0xDC00:#x} is not UTF-8") from error
        raise RowError("lone_surrogate", f"field '{field}': lone surrogate U+{code:04X}") from error
    return text


def _optional_fields(row: Row) -> Pair:
    split = optional(row, "split")
    if split is not None and (not isinstance(split, str) or split not in SPLITS):
        raise RowError("unknown_split", f"split {_shown(split)} is not one of {', '.join(SPLITS)}")
    weight, agreement = _number(row, "weight"), _number(row, "agreement")
    if weight is not None and weight <= 0:
        raise RowError("wrong_type", f"field 'weight' is {weight:g}; it must be above 0")
    if agreement is not None and not 0 <= agreement <= 1:
        raise RowError("wrong_type", f"field 'agreement' is {agreement:g}; it must be from 0 to 1")
    labels = {field: _label(row, field) for field in ("id", "source")}
    ratings = {field: _number(row, field) for field in ("chosen_rating", "rejected_rating")}
    return {**labels, **ratings, "split": split and SPLITS[split], "weight": weight, "agreement": agreement}


def _label(row: Row, field: str) -> str | None:
    value = optional(row, field)
    if value is None:
        return None
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("wrong_type", f"field '{field}' is {type(value).__name__}, not a text or a number")
    return _storable(str(value), field)


def _number(row: Row, field: str) -> float | None:
    value = optional(row, field)
    return None if value is None else _required_number(value, field)


def _required_number(value: Any, field: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("wrong_type", f"field '{field}' is {_shown(value)}, not a number")
    return number
