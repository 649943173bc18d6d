"""Judges that score each response by a function; the response with the higher score wins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dpo.common.errors import InputError
from dpo.engine.chat import Prompt
from dpo.evaluation.judges.rated_sentences import ridge_rating as ridge_rating  # beside vader_compound

ScoreFunction = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
"""Maps N prompts and N responses to N scores, higher is better."""


@dataclass(frozen=True)
class Scorer:
    """A judge that is a function or a reward model."""

    name: str
    function: ScoreFunction
    key: str  # in params.yaml, for errors

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        """Return one score per response.

        Raises:
            InputError: the function does not return exactly one finite number per response.
        """
        where = f"params.yaml: {self.key}: '{self.name}'"
        returned = self.function(prompts, responses)
        try:
            scores = [float(value) for value in returned]
        except (TypeError, ValueError) as error:
            fault = f"did not return a list of numbers: {error}; return one number per response"
            raise InputError(f"{where} {fault}") from error
        if len(scores) != len(responses):
            fault = f"returned {len(scores)} scores for {len(responses)} responses; return one per response"
            raise InputError(f"{where} {fault}")
        for number, (value, response) in enumerate(zip(scores, responses, strict=True), 1):
            if not math.isfinite(value):
                fault = f"returned {value} for response {number}, {response[:80]!r}; return finite scores"
                raise InputError(f"{where} {fault}")
        return scores

    def compare(
        self, prompts: list[Prompt], responses: list[str], others: list[str], other_scores: ArrayLike | None = None
    ) -> pd.DataFrame:
        """Compare by score; see `dpo.evaluation.judges.Judge.compare`."""
        scores = self.score(prompts, responses)
        other_scores = self.score(prompts, others) if other_scores is None else other_scores
        win = (np.sign(np.subtract(scores, other_scores)) + 1) / 2
        return pd.DataFrame({"win": win, "score": scores, "other_score": np.asarray(other_scores)})


def vader_compound(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Return the sentiment of each response, from -1 to 1, by the VADER lexicon (Hutto and Gilbert 2014).

    Prompts are ignored. No training stage uses this function.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]
