"""Judges of answers: a function, a reward model or a language model, as `evaluate.judge` names them."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dpo.common.errors import InputError
from dpo.engine.tokenization import Prompt
from dpo.evaluation.judges.llm import LlmJudge
from dpo.evaluation.judges.reward_model import reward_scorer
from dpo.evaluation.settings import LlmSettings, RewardModelSettings, ScorerSettings

Score = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
"""From prompts and their answers to one score each."""


@dataclass(frozen=True)
class Scorer:
    """Gives every answer a score of its own, higher is better."""

    score: Score


@dataclass(frozen=True)
class Comparer:
    """Says how often the first of two answers is the better one: 1, 0, or between."""

    compare: Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[float]]
    """From prompts, answers and other answers to the same prompts."""


Judge = Scorer | Comparer


def load_judge(params: ScorerSettings | RewardModelSettings | LlmSettings | None) -> Judge | None:
    """The judge that the parameters name, None where they name none.

    Models are loaded, and servers asked, when it first judges.

    Raises:
        InputError: a function cannot be imported or called; a model is no folder under `models/own/` and no hub
            id with a revision; a URL is none.
    """
    if params is None:
        return None
    if isinstance(params, ScorerSettings):
        return Scorer(_checked("function", params.function, _load_function(params.function)))
    if isinstance(params, RewardModelSettings):
        return Scorer(_checked("model", params.model, reward_scorer(params)))
    return Comparer(LlmJudge(params).compare)


def score_wins(scores: ArrayLike, others: ArrayLike) -> list[float]:
    """For each answer 1 if its score is above that of the other answer, 0 if below, 0.5 if they are equal."""
    wins: list[float] = ((np.sign(np.subtract(scores, others)) + 1) / 2).tolist()
    return wins


def vader_compound(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    """Sentiment of each answer from -1 to 1, by the lexicon of Hutto and Gilbert 2014; prompts are not looked at.

    No training stage uses it.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(answer)["compound"] for answer in answers]


def _load_function(name: str) -> Score:
    where = f"params.yaml: evaluate.judge.function: '{name}'"
    module, _, attribute = name.partition(":")
    try:
        function: Score = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{where} is no `module:function`: {error}") from error
    try:
        inspect.signature(function).bind([], [])
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} cannot be called with prompts and answers: {error}") from error
    return function


def _checked(field: str, name: str, score: Score) -> Score:
    """The same scorer, that ends in one clear error where it gives anything but a finite number an answer."""
    where = f"params.yaml: evaluate.judge.{field}: '{name}' gave"

    def checked(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        given = score(prompts, answers)
        try:
            scores = [float(value) for value in given]
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} no list of numbers: {error}; give one for each answer") from error
        if len(scores) != len(answers):
            raise InputError(f"{where} {len(scores)} scores for {len(answers)} answers; give one for each answer")
        for number, (value, answer) in enumerate(zip(scores, answers, strict=True), 1):
            if not math.isfinite(value):
                raise InputError(f"{where} answer {number}, {answer[:80]!r}, the score {value}; it must be finite")
        return scores

    return checked
