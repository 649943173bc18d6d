"""A judge of the default data: predicts the rating that people give a sentence, by ridge regression on n-grams.

It is fitted to the rated sentences of `dpo.data.human_ratings` that are too short or too long for pairs, so it has
seen no sentence of a pair.
"""

import functools
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dpo.common.bundled import RATINGS_SDIST, fetch
from dpo.common.files import atomic_write
from dpo.data.human_ratings import WORDS, Rated, read_ratings
from dpo.engine.chat import Prompt

FOLDER = Path(".judge-cache")
WORD_GRAMS, CHARACTER_GRAMS = (1, 2), (2, 5)
MIN_SENTENCES = 2  # in which an n-gram must occur
ALPHA = 1.0  # weight of the squared coefficients

log = logging.getLogger(__name__)


def ridge_rating(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Return the predicted rating of each response, about -4 (negative) to 4 (positive). Prompts are ignored.

    The first call in a folder downloads the sentences and stores the fit in `.judge-cache/`. No training stage
    uses this function.

    Raises:
        TransientError: the sentences cannot be downloaded.
    """
    return _stored_model()(responses).tolist()


def unpaired(domains: dict[str, list[Rated]]) -> list[Rated]:
    """Return the rated sentences whose number of words excludes them from pairs."""
    return [each for rated in domains.values() for each in rated if len(each.text.split()) not in WORDS]


class RatingModel:
    """Ridge regression of ratings on TF-IDF weights of n-grams.

    Args:
        features: the n-grams. Those of words start with `w`, those of characters with `c`.
        idf: inverse document frequency of each.
        coefficients: coefficient of each.
        intercept: rating of a text without any of them.
    """

    def __init__(
        self, features: Iterable[str], idf: ArrayLike, coefficients: ArrayLike, intercept: ArrayLike
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer  # here: scikit-learn starts slowly

        self.features = np.array(list(features))
        vocabulary = {name: place for place, name in enumerate(self.features.tolist())}
        self.weights = TfidfVectorizer(analyzer=_analyzer(), sublinear_tf=True, vocabulary=vocabulary)
        self.weights.idf_ = np.asarray(idf, float)
        self.coefficients, self.intercept = np.asarray(coefficients, float), float(np.asarray(intercept))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return the predicted rating of each text."""
        return self.weights.transform(texts) @ self.coefficients + self.intercept

    @classmethod
    def fit(cls, texts: Sequence[str], ratings: ArrayLike) -> "RatingModel":
        """Fit the model to rated texts. Equal texts in equal order give an equal model."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge

        weights = TfidfVectorizer(analyzer=_analyzer(), sublinear_tf=True, min_df=MIN_SENTENCES)
        ridge = Ridge(alpha=ALPHA, solver="sparse_cg", tol=1e-6).fit(weights.fit_transform(texts), ratings)
        return cls(weights.get_feature_names_out(), weights.idf_, ridge.coef_, ridge.intercept_)


def _analyzer() -> Callable[[str], list[str]]:
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(ngram_range=WORD_GRAMS).build_analyzer()
    characters = CountVectorizer(analyzer="char_wb", ngram_range=CHARACTER_GRAMS).build_analyzer()
    return lambda text: [f"w{each}" for each in words(text)] + [f"c{each}" for each in characters(text)]


@functools.cache
def _stored_model() -> RatingModel:
    """Return the fitted model from `.judge-cache/`. The file's name has a digest of what the fit depends on."""
    import sklearn

    inputs = (RATINGS_SDIST, WORDS, WORD_GRAMS, CHARACTER_GRAMS, MIN_SENTENCES, ALPHA, sklearn.__version__)
    path = FOLDER / f"ratings-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.npz"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            rated = unpaired(read_ratings(fetch(RATINGS_SDIST, Path(folder), source=True)))
        log.info("fitting the judge ridge_rating to %d rated sentences that are in no pair", len(rated))
        model = RatingModel.fit([each.text for each in rated], [each.mean for each in rated])
        with atomic_write(path) as tmp, tmp.open("wb") as file:
            np.savez_compressed(
                file,
                features=model.features,
                idf=model.weights.idf_,
                coefficients=model.coefficients,
                intercept=model.intercept,
            )
    with np.load(path, allow_pickle=False) as stored:
        return RatingModel(stored["features"], stored["idf"], stored["coefficients"], stored["intercept"])
