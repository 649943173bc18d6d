"""The judge that predicts ratings: its sentences are in no pair, its fit is deterministic and stored."""

import numpy as np
import pytest

from dpo.data.human_ratings import Rated, rating_pairs
from dpo.evaluation.judges import load_judges, rated_sentences
from dpo.evaluation.settings import ScorerSettings

GOOD, BAD = ("joy", "lovely", "delight"), ("bore", "dull", "mess")


def sentences():
    """Return 120 rated sentences: in turn, six of two words, six of four words and six of 26 words."""
    rated = []
    for number in range(120):
        word = (GOOD if number % 2 else BAD)[number // 2 % 3]
        texts = (f"{word} {number}", f"film {number} is {word}", f"{word} {number}" + " and so on" * 8)
        mean = 2.0 if number % 2 else -2.0
        rated.append(Rated(f"film/{number}", texts[number // 6 % 3], mean, (int(mean),)))
    return {"film review": rated}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Run in an empty folder with `sentences` in place of the download, and return the number of downloads."""
    fetched = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rated_sentences, "fetch", lambda *_, **__: fetched.append(1))
    monkeypatch.setattr(rated_sentences, "read_ratings", lambda _: sentences())
    rated_sentences._stored_model.cache_clear()
    yield fetched
    rated_sentences._stored_model.cache_clear()


def test_no_fitted_sentence_is_in_a_pair():
    fitted = {each.text for each in rated_sentences.unpaired(sentences())}
    pairs = rating_pairs(sentences(), min_rating_gap=1.0, eval_fraction=0.5, seed=0)
    assert len(fitted) == 78
    assert not fitted & {*pairs["chosen"], *pairs["rejected"]}


def test_the_judge_scores_words_of_the_fit_and_stores_it(stored):
    settings = ScorerSettings(kind="scorer", function="dpo.evaluation.judges.scorer:ridge_rating")
    (judge,) = load_judges([settings])
    assert judge.name == "ridge_rating"
    scores = judge.score(["p"] * 3, ["such a delight", "such a mess", ""])
    assert scores[0] > scores[2] > scores[1]
    rated_sentences._stored_model.cache_clear()
    assert judge.score(["p"] * 3, ["such a delight", "such a mess", ""]) == scores
    assert len(stored) == 1, "the second call reads the stored fit"
    assert len(list(rated_sentences.FOLDER.glob("ratings-*.npz"))) == 1


def test_other_settings_of_the_fit_have_a_file_of_their_own(stored, monkeypatch):
    rated_sentences.ridge_rating(["p"], ["a joy"])
    monkeypatch.setattr(rated_sentences, "ALPHA", 2.0)
    rated_sentences._stored_model.cache_clear()
    rated_sentences.ridge_rating(["p"], ["a joy"])
    assert len(stored) == len(list(rated_sentences.FOLDER.glob("ratings-*.npz"))) == 2


def test_predictions_equal_ridge_regression_in_closed_form():
    texts, ratings = ["a joy", "a bore", "a joy, a joy", "no bore"], np.array([2.0, -2.0, 3.0, 1.0])
    model = rated_sentences.RatingModel.fit(texts, ratings)
    x = model.weights.transform(texts).toarray()
    centred = x - x.mean(0)
    coefficients = np.linalg.solve(
        centred.T @ centred + np.eye(x.shape[1]), centred.T @ (ratings - ratings.mean())
    )
    expected = ratings.mean() + centred @ coefficients
    np.testing.assert_allclose(model(texts), expected, atol=1e-4)
