"""Judges of responses, as `evaluate.judges` lists them: functions, reward models, language models, verifiers."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dpo.common.functions import JUDGE
from dpo.engine.chat import Prompt
from dpo.evaluation.judges.llm import LlmJudge
from dpo.evaluation.judges.reward_model import RewardModel
from dpo.evaluation.judges.scorer import Scorer
from dpo.evaluation.judges.verifier import Verifier
from dpo.evaluation.settings import JudgeSettings, LlmSettings, ScorerSettings, VerifierSettings


class Judge(Protocol):
    """Compares responses to the same prompts, and scores single responses if it can."""

    @property
    def name(self) -> str:
        """Name in metrics and reports."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float] | None:
        """Return one score per response, higher is better. Return None if the judge can only compare."""

    def compare(
        self, prompts: list[Prompt], responses: list[str], others: list[str], other_scores: ArrayLike | None = None
    ) -> pd.DataFrame:
        """Compare each response with another response to the same prompt, and reuse `other_scores` if given.

        Returns:
            One row per prompt. `win` is 1 if the response is better, 0.5 for a tie, 0 if it is worse, a value in
            between if verdicts differ, and NaN if the judge gave no verdict. A judge that scores adds `score`
            and `other_score`, a verifier `right_work`.
        """


def load_judges(settings: Sequence[JudgeSettings]) -> list[Judge]:
    """Return the judges in the order of the settings. Models load, and servers are called, at first use.

    Raises:
        InputError: a function cannot be imported or called, a model is neither a folder in `models/own/` nor a
            hub id with a revision, a URL is invalid, or a table of answers cannot be read.
    """
    return [load_judge(each, f"evaluate.judges.{number}") for number, each in enumerate(settings)]


def used_replies(judges: Sequence[Judge]) -> dict[str, list[Any]]:
    """Return the replies that paid judges have used, by key, as lists of the fields of `Reply`."""
    paid = [judge for judge in judges if isinstance(judge, LlmJudge)]
    return {key: list(astuple(reply)) for judge in paid for key, reply in sorted(judge.replies.items())}


def against_base(
    judge: Judge, prompts: list[Prompt], responses: pd.DataFrame, scores: pd.Series | None, base: pd.DataFrame
) -> pd.Series:
    """Return the win of each response over the base model's, from 0 to 1; NaN without a verdict or its response.

    Scores are compared if both sides have them, so that no response is scored twice.

    Args:
        judge: the judge.
        prompts: N prompts.
        responses: N rows with the column `response`.
        scores: the judge's scores of these responses, None if it only compares.
        base: N rows with the column `base_response` and, if the judge scores, `base_score/NAME`.
    """
    if scores is not None:
        return scores.sub(base[f"base_score/{judge.name}"]).map(np.sign).add(1).div(2)
    others = base["base_response"].dropna()
    own = responses.loc[others.index, "response"].tolist()
    wins = judge.compare([prompts[row] for row in others.index], own, others.tolist())["win"]
    return pd.Series(wins.to_numpy(), others.index).reindex(responses.index)


def load_judge(settings: JudgeSettings, key: str) -> Judge:
    """Return the judge of the settings at `key` in params.yaml, as `load_judges` does."""
    if isinstance(settings, LlmSettings):
        return LlmJudge(settings, key)
    if isinstance(settings, VerifierSettings):
        return Verifier(settings, key)
    if isinstance(settings, ScorerSettings):
        return Scorer(
            settings.name, JUDGE.load(settings.function, f"params.yaml: {key}.function"), f"{key}.function"
        )
    return Scorer(settings.name, RewardModel(settings, key), f"{key}.model")
