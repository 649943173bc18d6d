"""Judges: their names, verdicts from scores, and functions that score."""

import json

import pandas as pd
import pytest
from pydantic import TypeAdapter, ValidationError

from dpo.common.errors import InputError
from dpo.evaluation.judges import load_judges
from dpo.evaluation.settings import EvaluateSettings, ScorerSettings
from tests.support.judges import FREE, load_judge


@pytest.fixture
def own_scorer(tmp_path, monkeypatch):
    """Return a function that makes a judge from Python code with a function `f`."""

    def make(code):
        name = f"scorer_{abs(hash(code))}"
        (tmp_path / f"{name}.py").write_text(code)
        return load_judge(ScorerSettings(kind="scorer", function=f"{name}:f"))

    monkeypatch.syspath_prepend(tmp_path)
    return make


def test_default_scorer_scores_sentiment_and_ignores_prompts():
    judge = load_judge(ScorerSettings(kind="scorer", function="dpo.evaluation.judges.scorer:vader_compound"))
    assert judge.name == "vader_compound"
    responses = ["What a wonderful, moving film.", "A dreadful, boring mess.", ""]
    good, bad, empty = judge.score(["a horrible prompt"] * 3, responses)
    assert -1 <= bad < 0 < good <= 1
    assert empty == 0
    assert judge.score([[{"role": "user", "content": "lovely"}]] * 3, responses) == [good, bad, empty]


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "dpo.evaluation.judges.scorer:absent",
        "no.such.module:f",
        "",
        ":f",
        "math:pi",
        "math:sqrt",
        "json:loads",
    ],
)
def test_function_that_cannot_be_called_is_an_error_at_load_time(name):
    with pytest.raises(InputError, match=rf"evaluate\.judges\.0\.function: '{name}' cannot be"):
        load_judge(ScorerSettings(kind="scorer", function=name))


def test_scorer_gets_prompts_and_responses_and_may_return_arrays(own_scorer):
    judge = own_scorer(
        "import numpy as np\ndef f(p, a): return np.float32([len(x) - len(y) for x, y in zip(p, a)])"
    )
    scores = judge.score(["abc", "d"], ["", "ef"])
    assert scores == [3.0, -1.0]
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1.0]", ["1 scores for 2 responses"]),
        ("[1.0] * 3", ["3 scores for 2 responses"]),
        ("[0.5, float('nan')]", ["response 2", "'the second'", "nan"]),
        ("[float('inf'), 1]", ["response 1", "'the first'", "inf"]),
        ("[1.0, None]", ["did not return a list of numbers"]),
        ("1.0", ["did not return a list of numbers"]),
    ],
)
def test_scores_other_than_one_finite_number_per_response_are_an_error(own_scorer, value, words):
    judge = own_scorer(f"def f(prompts, responses): return {value}")
    with pytest.raises(InputError, match=r"evaluate\.judges\.0\.function: 'f' (returned|did not)") as error:
        judge.score(["p", "q"], ["the first", "the second"])
    assert all(word in str(error.value) for word in words), error.value


def test_higher_score_wins_and_equal_scores_tie(own_scorer):
    judge = own_scorer("def f(prompts, responses): return map(len, responses)")
    table = judge.compare(["p", "q", "r"], ["long", "a", "same"], ["x", "long", "size"])
    expected = {"win": [1.0, 0.0, 0.5], "score": [4.0, 1.0, 4.0], "other_score": [1.0, 4.0, 4.0]}
    assert table.to_dict("list") == expected


def test_scores_that_are_known_are_not_computed_again(own_scorer):
    judge = own_scorer(
        "def f(prompts, responses):\n assert 'known' not in responses\n return [1] * len(responses)"
    )
    table = judge.compare(["p", "q"], ["a", "b"], ["known", "known"], pd.Series([2.0, 0.5]))
    assert table.to_dict("list") == {"win": [0.0, 1.0], "score": [1.0, 1.0], "other_score": [2.0, 0.5]}


LLM = {"kind": "llm", "base_url": "http://127.0.0.1:1/v1", "criterion": "Length.", "parallel": 1, **FREE}
NAMED = {
    "vader_compound": {"kind": "scorer", "function": "dpo.evaluation.judges.scorer:vader_compound"},
    "rm-3": {"kind": "reward_model", "model": "someone/rm-3", "revision": "main"},
    "gpt-x-free": {**LLM, "model": "vendor/gpt-x:free"},
}


def evaluate_settings(*judges):
    values = json.dumps({"samples": 1, "max_new_tokens": 1, "judges": judges})
    return TypeAdapter(EvaluateSettings).validate_json(values)


def test_judges_load_in_order_and_are_named_after_their_function_or_model():
    settings = evaluate_settings(*NAMED.values())
    assert [judge.name for judge in load_judges(settings.judges)] == list(NAMED)
    assert load_judges(evaluate_settings().judges) == []


def test_two_judges_of_one_name_are_an_error():
    with pytest.raises(ValidationError, match="judges need different names"):
        evaluate_settings(NAMED["rm-3"], {**LLM, "model": "other/rm-3"})
