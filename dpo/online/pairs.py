"""Preference pairs of ranked responses to the same prompts."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA
from dpo.data.settings import ValidateSettings
from dpo.data.validate import validate
from dpo.engine.chat import Prompt
from dpo.engine.tokenization import TokenRow
from dpo.evaluation.judges import Judge

PROMPT_FIELDS = ("prompt", "turns", "tools", "chat_template_kwargs")

SAMPLED_RULES: dict[str, Any] = {
    "near_duplicate_pair": "warn",
    "contradiction": "warn",
    "completion_too_long": "quarantine",
}
"""Actions for sampled pairs. Responses of one policy resemble each other, so the first two are no faults."""


def score_responses(judge: Judge, prompts: list[Prompt], responses: list[str], answers: int) -> list[float]:
    """Return one score per response. Each prompt appears `answers` times in a row.

    If the judge can only compare, a score is the mean of the verdicts against the other responses to the prompt.
    """
    scores = judge.score(prompts, responses)
    if scores is not None:
        return scores
    wins = [0.0] * len(responses)
    for first, second in combinations(range(answers), 2):
        places = list(zip(range(first, len(wins), answers), range(second, len(wins), answers), strict=True))
        own, others = ([responses[pair[side]] for pair in places] for side in (0, 1))
        verdicts = judge.compare([prompts[place] for place, _ in places], own, others)["win"].fillna(0.5)
        for (a, b), win in zip(places, verdicts, strict=True):
            wins[a] += win / (answers - 1)
            wins[b] += (1 - win) / (answers - 1)
    return wins


def ranked_pairs(
    prompts: Sequence[Mapping[Any, Any]], answers: pd.DataFrame, name: str
) -> tuple[list[dict[str, Any]], list[TokenRow]]:
    """Pair the best and the worst finished response to each prompt, unless their scores are equal.

    A response that was truncated is in no pair: as a completion it would teach the policy to stop there.

    Args:
        prompts: canonical pairs, of which the fields of the prompt are used.
        answers: columns `number` (of the prompt), `prompt_ids`, `response`, `ids`, `finished` and `score`.
        name: start of the ids of the pairs, and their source.

    Returns:
        Canonical pairs with the scores as ratings, and their token rows with the ids that were sampled.
    """
    pairs, rows = [], []
    for key, group in answers[answers["finished"]].groupby("number"):
        number = int(str(key))
        best, worst = (group.iloc[int(place)] for place in (group["score"].argmax(), group["score"].argmin()))
        if best["score"] == worst["score"]:
            continue
        prompt, pair_id = prompts[number], f"{name}-{number}"
        pairs.append(
            {
                **dict.fromkeys(PAIRS_SCHEMA.names),
                **{field: prompt.get(field) for field in PROMPT_FIELDS},
                **{"id": pair_id, "split": "train", "source": name},
                **{"chosen": best["response"], "rejected": worst["response"]},
                **{"chosen_rating": float(best["score"]), "rejected_rating": float(worst["score"])},
            }
        )
        ids = (best["prompt_ids"], best["ids"], worst["ids"])
        prompt_ids, *completions = (tuple(map(int, each)) for each in ids)
        rows.append(TokenRow(pair_id, prompt_ids, tuple(completions)))
    return pairs, rows


def check_pairs(
    pairs: list[dict[str, Any]],
    folder: Path,
    params: ValidateSettings,
    *,
    tokenizer: Path,
    max_length: int,
    benchmarks: Path,
) -> dict[str, int]:
    """Check sampled pairs against the data contract; write `pairs.parquet` and `quarantine.parquet` to `folder`.

    Near duplicates and contradictions are only counted, unless `params.rules` sets their actions. The share of
    quarantined pairs has no limit.

    Returns:
        The number of violations of each rule that was broken.

    Raises:
        InputError: a rule is broken whose action is `error`.
    """
    outputs = {"train": folder / "pairs.parquet", "quarantine": folder / "quarantine.parquet"}
    schemas = {"train": PAIRS_SCHEMA, "quarantine": RAW_PAIRS_SCHEMA}
    if not pairs:
        _write_all((outputs[name], schemas[name], []) for name in outputs)
        return {}
    raw, name = folder / "raw.parquet", pairs[0]["source"]
    origin = {"file": name, "original": "", "rule": None, "reason": None}
    _write_all([(raw, RAW_PAIRS_SCHEMA, [{**pair, **origin, "line": i} for i, pair in enumerate(pairs, 1)])])
    profile = ValidateSettings(
        max_quarantined=1.0,
        near_duplicate_similarity=params.near_duplicate_similarity,
        max_longer_share=params.max_longer_share,
        max_drift=params.max_drift,
        rules=SAMPLED_RULES | params.rules,
    )
    checked = validate(
        raw, profile, tokenizer=tokenizer, max_length=max_length, benchmarks=benchmarks, caps={"train": None},
        seed=0, origin=name, previous=None, outputs=outputs,
    )  # fmt: skip
    raw.unlink()
    if broken := [error.message for error in checked.errors if error.code == "rule_broken"]:
        raise InputError("\n".join(f"{name}: the sampled pairs must not be used: {each}" for each in broken))
    if not outputs["train"].is_file():  # every pair is quarantined
        _write_all([(outputs["train"], PAIRS_SCHEMA, [])])
    return {rule: count for rule, count in checked.metrics["rules"].items() if count}


def _write_all(tables: Iterable[tuple[Path, pa.Schema, list[dict[str, Any]]]]) -> None:
    for path, schema, rows in tables:
        with atomic_write(path) as tmp:
            pq.write_table(pa.Table.from_pylist(rows, schema), tmp)
