"""The accepted shapes of a row of preference data, and how each becomes canonical pairs.

Every format is one function from a raw row (a mapping as JSON gives it) to pairs; which one a source has is
detected from its first rows. A row of which no pair can be made raises `RowFault` with the rule that it breaks.
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


class RowFault(Exception):
    """No pair can be made of a row: the rule that it breaks, and how."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule, self.reason = rule, reason


def detect(rows: Collection[Row], origin: str) -> str:
    """The format of a source, a key of `FORMATS`: that which most of the given rows have.

    Raises:
        InputError: no row has one, or the data is unpaired.
    """
    found = [name for row in rows if (name := _detect_row(row))]
    if found:
        return max(FORMATS, key=found.count)
    fields = sorted({str(field) for row in rows for field in row})
    if {"completion", "label"} <= set(fields):
        raise InputError(
            f"{origin}: rows with 'completion' and 'label' are unpaired data, made for KTO, not for DPO; "
            "bring pairs, or join a good and a bad completion of each prompt as 'chosen' and 'rejected'"
        )
    raise InputError(
        f"{origin}: no known format (found {', '.join(map(repr, fields)) or 'no field'}); each row needs "
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
    """The pairs of one row: `prompt`, `turns`, `chosen`, `rejected` and the optional fields, checked for type.

    Args:
        row: a raw row.
        form: from `detect`.
        pairing: of several rated completions, the best against the worst or against each lesser one.

    Raises:
        RowFault: no pair can be made of it.
    """
    pairs = FORMATS[form](row, pairing)
    shared = _optional(row)
    name = shared.pop("id")
    for number, pair in enumerate(pairs):
        for field in ("prompt", "chosen", "rejected"):
            _storable(pair[field], field)
        pair |= {k: v for k, v in shared.items() if pair.get(k) is None}
        pair["id"] = (name if len(pairs) == 1 else f"{name}/{number}") if name else content_id(pair)
    return pairs


def content_id(pair: Pair) -> str:
    """A name made of the pair's texts."""
    text = "\x1f".join(pair[field] for field in ("prompt", "chosen", "rejected"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def normal(text: str) -> str:
    """A text without the differences that nobody would call another answer: case, space, compatibility forms."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def _pairs(row: Row, pairing: Pairing) -> list[Pair]:
    prompt, chosen, rejected = _prompt(row), _present(row, "chosen"), _present(row, "rejected")
    if all(isinstance(value, list) and len(value) > 1 for value in (chosen, rejected)):
        pair = _conversation(_turns(chosen, "chosen"), _turns(rejected, "rejected"))
        asked = _prompt_fields(prompt)["prompt"]
        openings = [pair["prompt"], *(turn["content"] for turn in (pair["turns"] or [])[-1:])]
        if asked.strip() not in [opening.strip() for opening in openings]:
            raise RowFault("broken_roles", "the field 'prompt' is not what the conversations start with")
        return [pair]
    completions = {"chosen": _completion(chosen, "chosen"), "rejected": _completion(rejected, "rejected")}
    return [{**_prompt_fields(prompt), **completions}]


def _conversations(row: Row, pairing: Pairing) -> list[Pair]:
    sides = [_turns(_present(row, field), field) for field in ("chosen", "rejected")]
    return [_conversation(*sides)]


def _transcripts(row: Row, pairing: Pairing) -> list[Pair]:
    text = _text(_present(row, "chosen"), "chosen")
    chosen = _parse_transcript(text, "chosen")
    rejected = _parse_transcript(_text(_present(row, "rejected"), "rejected"), "rejected")
    pair = _conversation(chosen, rejected)
    opening = text[: text.rindex(HH_ANSWER) + len(HH_ANSWER)]
    return [{**pair, "prompt": opening, "turns": chosen[:-1]}]


def _scored_completions(row: Row, pairing: Pairing) -> list[Pair]:
    completions = _listed(_present(row, "completions"), "completions")
    texts, scores = [], []
    for completion in completions:
        if not isinstance(completion, Mapping):
            raise RowFault("wrong_type", "field 'completions' holds something that is no object")
        text = next((completion[field] for field in TEXTS if field in completion), None)
        score = next((completion[field] for field in SCORES if completion.get(field) is not None), None)
        texts.append(_text(text, "completions"))
        scores.append(_required_number(score, "completions: score"))
    return _of_scores(row, texts, scores, pairing)


def _rated_responses(row: Row, pairing: Pairing) -> list[Pair]:
    texts = [_text(text, "responses") for text in _listed(_present(row, "responses"), "responses")]
    field = next(f for f in (*SCORE_LISTS, *RANK_LISTS) if f in row or f == RANK_LISTS[-1])
    values = [_required_number(value, field) for value in _listed(_present(row, field), field)]
    if len(values) != len(texts):
        raise RowFault("wrong_type", f"{len(texts)} responses have {len(values)} {field}")
    if field not in RANK_LISTS:
        return _of_scores(row, texts, values, pairing)
    no_rating = {"chosen_rating": None, "rejected_rating": None}  # a rank orders, it does not rate
    return [{**pair, **no_rating} for pair in _of_scores(row, texts, [-value for value in values], pairing)]


def _of_scores(row: Row, texts: list[str], scores: list[float], pairing: Pairing) -> list[Pair]:
    asked = _prompt_fields(_prompt(row))
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    lesser = [i for i in order if scores[i] < scores[order[0]]]
    if not lesser:
        raise RowFault("no_preference", f"none of {len(texts)} completions is rated higher than another")
    best = order[0]
    return [
        {
            **asked,
            "chosen": texts[best],
            "rejected": texts[worse],
            "chosen_rating": scores[best],
            "rejected_rating": scores[worse],
        }
        for worse in (lesser[-1:] if pairing == "best_worst" else lesser)
    ]


FORMATS: dict[str, Callable[[Row, Pairing], list[Pair]]] = {
    "pairs": _pairs,
    "conversations": _conversations,
    "transcripts": _transcripts,
    "scored completions": _scored_completions,
    "rated responses": _rated_responses,
}


def _conversation(chosen: list[Turn], rejected: list[Turn]) -> Pair:
    """The pair of two conversations: what they share up to their last turns is the prompt."""
    for turns, field in ((chosen, "chosen"), (rejected, "rejected")):
        if not turns or turns[-1]["role"] != "assistant":
            raise RowFault("broken_roles", f"field '{field}' does not end with an assistant turn")
    if chosen[:-1] != rejected[:-1]:
        raise RowFault("broken_roles", "the conversations part before their last turn")
    pair = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    return {**_asked(chosen[:-1]), **pair}


def _prompt_fields(prompt: Any) -> Pair:
    return {"prompt": prompt, "turns": None} if isinstance(prompt, str) else _asked(_turns(prompt, "prompt"))


def _asked(turns: list[Turn]) -> Pair:
    """Prompt fields of a conversation up to the assistant's answer; a lone user turn needs no `turns`."""
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or len(spoken) % 2 == 0 or spoken != [*["user", "assistant"] * (len(spoken) // 2), "user"]:
        raise RowFault(
            "broken_roles",
            f"the prompt's roles are {', '.join(roles) or 'none'}; they must alternate, the user first and last",
        )
    if roles == ["user"]:
        return {"prompt": turns[0]["content"], "turns": None}
    text = "".join(f"\n\n{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    return {"prompt": f"{text.lstrip()}{HH_ANSWER}", "turns": turns}


def _turns(value: Any, field: str) -> list[Turn]:
    turns = []
    for turn in _listed(value, field):
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise RowFault(
                "wrong_type", f"field '{field}' holds something that is no turn with 'role' and 'content'"
            )
        if turn["role"] not in ROLES:
            raise RowFault(
                "broken_roles", f"field '{field}': unknown role {_shown(turn['role'])}, not of {', '.join(ROLES)}"
            )
        turns.append({"role": turn["role"], "content": _storable(_text(turn["content"], field), field)})
    return turns


def _parse_transcript(text: str, field: str) -> list[Turn]:
    parts = HH_TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if parts[0].strip() or len(parts) == 1:
        raise RowFault("broken_roles", f"field '{field}' does not start with 'Human:'")
    return [
        {"role": HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _completion(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    turns = _turns(value, field)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise RowFault("broken_roles", f"field '{field}' must hold one assistant turn")
    return turns[0]["content"]


def _prompt(row: Row) -> Any:
    field = next((f for f in PROMPTS if row.get(f) is not None), None)
    if field is None:
        raise RowFault("missing_text", "field 'prompt' is missing or null")
    if not isinstance(row[field], str):
        _listed(row[field], field)
    return row[field]


def _present(row: Row, field: str) -> Any:
    if row.get(field) is None:
        raise RowFault("missing_text", f"field '{field}' is missing or null")
    return row[field]


def given(row: Row, field: str) -> Any:
    """The value of an optional field; an empty text and NaN, as tables have them, are as good as none."""
    value = row.get(field)
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def _shown(value: Any) -> str:
    """The start of a value, for messages, however large or deep it is."""
    return repr((value if isinstance(value, str) else reprlib.repr(value))[:40])


def _text(value: Any, field: str) -> str:
    if value is None:
        raise RowFault("missing_text", f"field '{field}' holds a null where a text belongs")
    if not isinstance(value, str):
        raise RowFault("wrong_type", f"field '{field}' holds {type(value).__name__} {_shown(value)}, not a text")
    return value


def _listed(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowFault("wrong_type", f"field '{field}' holds {type(value).__name__}, not a text or a list")
    return value


def _storable(text: str, field: str) -> str:
    """UTF-8 can hold every text but one with half of a surrogate pair, or with bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            raise RowFault("invalid_utf8", f"field '{field}': byte {code - 0xDC00:#x} is no UTF-8") from error
        raise RowFault("lone_surrogate", f"field '{field}': lone surrogate U+{code:04X}") from error
    return text


def _optional(row: Row) -> Pair:
    split = given(row, "split")
    if split is not None and (not isinstance(split, str) or split not in SPLITS):
        raise RowFault("unknown_split", f"split {_shown(split)} is none of {', '.join(SPLITS)}")
    weight, agreement = _number(row, "weight"), _number(row, "agreement")
    if weight is not None and weight <= 0:
        raise RowFault("wrong_type", f"field 'weight' is {weight:g}; it must be above 0")
    if agreement is not None and not 0 <= agreement <= 1:
        raise RowFault("wrong_type", f"field 'agreement' is {agreement:g}; it must be from 0 to 1")
    return {
        "id": _label(row, "id"),
        "split": None if split is None else SPLITS[split],
        "source": _label(row, "source"),
        "timestamp": _label(row, "timestamp"),
        "weight": weight,
        "agreement": agreement,
        "chosen_rating": _number(row, "chosen_rating"),
        "rejected_rating": _number(row, "rejected_rating"),
    }


def _label(row: Row, field: str) -> str | None:
    value = given(row, field)
    if value is None:
        return None
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowFault("wrong_type", f"field '{field}' holds {type(value).__name__}, not a text or a number")
    return _storable(str(value), field)


def _number(row: Row, field: str) -> float | None:
    value = given(row, field)
    return None if value is None else _required_number(value, field)


def _required_number(value: Any, field: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowFault("wrong_type", f"field '{field}' holds {_shown(value)}, not a number")
    return number
