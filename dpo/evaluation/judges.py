"""Judges: functions from texts to scores, higher is better, named in params.yaml as `module:function`."""

import importlib
from collections.abc import Callable, Sequence

from dpo.errors import InputError

Judge = Callable[[Sequence[str]], list[float]]


def load_judge(name: str) -> Judge:
    """Import a judge by its `module:function` name.

    Raises:
        InputError: the name has another form, or nothing of that name can be imported.
    """
    module, _, function = name.partition(":")
    try:
        judge: Judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"params.yaml: evaluate.judge: '{name}' is no `module:function`: {error}") from error
    return judge


def vader_compound(texts: Sequence[str]) -> list[float]:
    """Sentiment of each text from -1 to 1, by the lexicon of Hutto and Gilbert 2014; no training stage uses it."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]
