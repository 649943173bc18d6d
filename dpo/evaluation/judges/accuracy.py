"""How often a judge agrees with the people who made the preference data."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from dpo.engine.chat import prompt_of
from dpo.evaluation.bootstrap import bootstrap, ratio
from dpo.evaluation.judges import Judge


def judge_accuracy(
    judges: Sequence[Judge], held_out: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> dict[str, Any]:
    """Return each judge's accuracy on up to `count` held-out pairs, with its 95% interval, resampled by prompt.

    The accuracy is the share of pairs in which the judge prefers chosen; ties count one half, pairs without a
    verdict are left out. Chance has 0.5, and an interval that includes it means that the judge's win rates say
    nothing about the preferences in the data. Labelled rows are not compared.

    Returns:
        `judge_pairs`; `judge_accuracy` and `judge_accuracy_ci` of the first judge; `judge_accuracy/NAME` and its
        interval of each further one.
    """
    held_out = held_out[held_out["chosen"].notna() & held_out["rejected"].notna()]
    if held_out.empty:
        return {}
    pairs = held_out.sample(min(count, len(held_out)), random_state=seed)
    prompts = [prompt_of(pair, tokenizer) for pair in pairs.to_dict("records")]
    statistics = {}
    for number, judge in enumerate(judges):
        wins = judge.compare(prompts, pairs["chosen"].tolist(), pairs["rejected"].tolist())["win"]
        suffix = f"/{judge.name}" if number else ""
        statistics[f"judge_accuracy{suffix}"] = ratio(wins.fillna(0), wins.notna())
    if not judges:
        return {}
    return {"judge_pairs": len(pairs), **bootstrap(statistics, pairs["prompt"].tolist(), seed)}
