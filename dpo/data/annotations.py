"""Exports of annotation tools: completions that people compared, in Label Studio and Argilla."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo.data.reading import RESPONSE_LISTS, SIDES, Example, Reading, side
from dpo.data.turns import Fields, RowError, from_json, shown

ANSWER = re.compile(r"(response|answer|completion|generation|output|text)[-_ ]?([0-9]|[ab])", re.IGNORECASE)
"""Names of fields with one of several completions."""


def label_studio(row: Reading) -> Example:
    """Read an export of Label Studio: `data` with prompt and completions, `annotations` with the selected side.

    In the export JSON-MIN, `comparison` is the selected side and all fields are those of the row.
    """
    if "comparison" in row.fields:
        chosen = from_json(row.fields["comparison"])
        sides: list[Any] = [chosen.get("selected") if isinstance(chosen, Mapping) else chosen]
        inner = row
    else:
        data = from_json(row.fields.required("data"))
        if not isinstance(data, Mapping):
            raise RowError("wrong_type", f"field 'data' is {shown(data)}, not an object")
        sides = list(_selected(from_json(row.fields.required("annotations"))))
        inner = Reading(Fields(data, "data."), row.roles, row.unread, row.notes)
    if not sides or any(selected != sides[0] for selected in sides):
        found = ", ".join(sorted(set(map(str, sides)))) or "nothing"
        raise RowError("no_preference", f"{len(sides)} annotations select {found}")
    example = inner.example(_answers(inner)[:2], [side(sides[0], "selected"), 0.0])
    if inner is not row:
        row.unread |= set(inner.fields.unread())
    return example


def _selected(annotations: Any) -> Iterator[Any]:
    """Yield the sides that annotations select, except those that were cancelled."""
    try:
        for annotation in annotations:
            for result in () if annotation.get("was_cancelled") else annotation["result"]:
                value = result["value"]
                if "selected" in value:
                    yield value["selected"]
                elif len(choices := value.get("choices") or []) == 1 and str(choices[0]).lower() in SIDES:
                    yield choices[0]
    except (AttributeError, TypeError, KeyError) as error:
        raise RowError("wrong_type", "field 'annotations' has no result with a selected side") from error


def _answers(row: Reading) -> list[list[Any]]:
    """Return the two or more completions of a row, which are fields of their own or a list."""
    names = _answer_names(row.fields) or [name for name in ("left", "right") if name in row.fields]
    items = [(name, row.fields[name]) for name in names]
    if not items:
        name = next((name for name in RESPONSE_LISTS if name in row.fields), "answer1")
        values = from_json(row.fields.required(name))
        items = [(name, value) for value in values] if isinstance(values, list) else []
    if len(items) < 2:
        raise RowError("missing_text", f"field '{row.fields.prefix}answer2' is missing or null")
    return [row.completion(value, f"{row.fields.prefix}{name}") for name, value in items]


def _answer_names(fields: Fields) -> list[str]:
    return sorted(name for name in fields.unread_names() if ANSWER.fullmatch(name))


def is_argilla(fields: Fields) -> bool:
    """Return whether a row is a record of Argilla, or a row of an export of several compared fields."""
    if isinstance(from_json(fields.peek("fields")), Mapping):
        return True
    return len(_answer_names(fields)) > 1 and any(_is_judgement(name, fields) for name in fields.unread_names())


def _is_judgement(name: str, fields: Fields) -> bool:
    if name.endswith((".responses", ".suggestion", "-suggestion")):
        return True
    value = from_json(fields.peek(name))
    return isinstance(value, list) and all(isinstance(v, Mapping) and "value" in v for v in value)


def argilla(row: Reading) -> Example:
    """Read an export of Argilla: texts of `fields`, and the best one, or a ranking, of responses or suggestions.

    Records of both versions and their flat exports are read. Suggestions count if there is no response.
    """
    given, fields = from_json(row.fields.get("fields")), row.fields
    inner = row
    if given is not None:
        if not isinstance(given, Mapping):
            raise RowError("wrong_type", f"field 'fields' is {shown(given)}, not an object")
        inner = Reading(Fields(given, "fields."), row.roles, row.unread, row.notes)
        responses = _of_records(from_json(fields.get("responses")))
        suggestions = _of_records(from_json(fields.get("suggestions")))
    else:
        responses, suggestions = _of_columns(fields)
    names = _answer_names(inner.fields)
    if len(names) < 2:
        raise RowError("missing_text", f"field '{inner.fields.prefix}response_2' is missing or null")
    orders = [order for value in responses if (order := _order(value, names))]
    orders = orders or [order for value in suggestions if (order := _order(value, names))]
    if not orders:
        raise RowError("no_preference", f"no response or suggestion compares {', '.join(names) or 'completions'}")
    if any(order != orders[0] for order in orders):
        raise RowError("no_preference", f"{len(orders)} responses disagree")
    completions = [inner.completion(inner.fields[name], f"{inner.fields.prefix}{name}") for name in names]
    example = inner.example(completions, [-orders[0].get(name, len(names)) for name in names])
    if inner is not row:
        row.unread |= set(inner.fields.unread())
    return example


def _of_records(value: Any) -> list[Any]:
    """Return the values of responses or suggestions of a record, without discarded ones."""
    found: list[Any] = []
    if isinstance(value, Mapping):  # version 2: by question
        for items in value.values():
            found += items if isinstance(items, list) else [items]
    elif isinstance(value, list):  # version 1: a response has the values of several questions
        for item in filter(lambda item: isinstance(item, Mapping), value):
            values = item.get("values") or {"": item}
            found += [
                {**each, "status": item.get("status")} for each in values.values() if isinstance(each, Mapping)
            ]
    return _values(found)


def _values(items: Sequence[Any]) -> list[Any]:
    return [
        item.get("value") for item in items if isinstance(item, Mapping) and item.get("status") not in DISCARDED
    ]


DISCARDED = ("discarded", "draft")


def _of_columns(fields: Fields) -> tuple[list[Any], list[Any]]:
    """Return the values of responses and of suggestions in the columns of an exported table."""
    responses: list[Any] = []
    suggestions: list[Any] = []
    for name in [name for name in fields.unread_names() if _is_judgement(name, fields)]:
        value = from_json(fields[name])
        if name.endswith(("-suggestion", ".suggestion")):
            suggestions.append(value)
        elif name.endswith(".responses"):
            status = from_json(fields.get(f"{name}.status")) or []
            values = value if isinstance(value, list) else [value]
            responses += [v for n, v in enumerate(values) if n >= len(status) or status[n] not in DISCARDED]
        else:
            responses += _values(value)
    return responses, suggestions


def _order(value: Any, names: Sequence[str]) -> dict[str, float] | None:
    """Return the rank of each completion that an answer to a question names, or None if it names none."""
    value = from_json(value)
    if isinstance(value, str):
        return {value: 1.0} if value in names else None
    if isinstance(value, Mapping) and isinstance(value.get("rank"), list) and isinstance(value.get("value"), list):
        value = [{"rank": r, "value": v} for r, v in zip(value["rank"], value["value"], strict=False)]
    if not isinstance(value, list) or not value:
        return None
    items = [item if isinstance(item, Mapping) else {"value": item, "rank": n} for n, item in enumerate(value, 1)]
    try:
        order = {item["value"]: float(item["rank"]) for item in items}
    except (KeyError, TypeError, ValueError):
        return None
    return order if set(order) <= set(names) else None
