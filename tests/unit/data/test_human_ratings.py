"""The default data: agreement of raters, pairing of sentences, and the package file."""

import io
import tarfile

import numpy as np
import pandas as pd

from dpo.data.human_ratings import (
    EVAL_PHRASINGS,
    TRAIN_PHRASINGS,
    Rated,
    agreement,
    rating_pairs,
    read_ratings,
)


def test_agreement_counts_ties_as_one_half():
    # Of the four pairings (2,1) (2,3) (3,1) (3,3): two wins, one loss, one tie.
    assert agreement((2, 3), (1, 3)) == 2.5 / 4
    assert agreement((4, 4), (1, 1)) == 1.0
    assert agreement((0,), (0,)) == 0.5


def sentences(domain, count):
    rng = np.random.default_rng(0)
    return [
        Rated(f"{domain}/{i}", f"the {domain} sentence number {i} here", float(m), (int(m), int(m) + 1))
        for i, m in enumerate(rng.uniform(-4, 4, count))
    ]


def test_rating_pairs_use_each_sentence_once_and_prefer_the_higher_mean():
    domains = {"film review": sentences("a", 300), "product review": sentences("b", 300)}
    table = rating_pairs(domains, min_rating_gap=1.0, eval_fraction=0.2, seed=3)
    texts = [*table["chosen"], *table["rejected"]]
    assert len(texts) == len(set(texts))
    assert ((table["chosen_rating"] - table["rejected_rating"]) >= 1.0).all()
    means = {s.text: s.mean for group in domains.values() for s in group}
    assert all(means[text] == rating for text, rating in zip(table["chosen"], table["chosen_rating"], strict=True))
    assert set(table["source"]) == set(domains)
    assert not set(TRAIN_PHRASINGS) & set(EVAL_PHRASINGS)
    pd.testing.assert_frame_equal(table, rating_pairs(domains, min_rating_gap=1.0, eval_fraction=0.2, seed=3))


def test_ties_are_skipped():
    tied = {"film review": [Rated(f"a/{i}", f"one two three four {i}", 1.0, (1,)) for i in range(40)]}
    assert (
        len(rating_pairs({**tied, "x": sentences("x", 40)}, min_rating_gap=0.0, eval_fraction=0.2, seed=1)) == 20
    )


def test_read_ratings_skips_inconsistent_means_and_repeated_texts(tmp_path):
    truth = "1\t1.5\tA fine  film.\r\n2\t-1.0\tDull.\r\n3\t2.0\ta fine film.\r\n4\t0.0\tMeh.\r\n"
    raters = "\ufeff1\t1.500000001\t0.5\t[1, 2]\r\n2\t-2.0\t0\t[-2]\r\n3\t2.0\t0\t[2]\r\n4\t0.0\t0\t[0]\r\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for prefix in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets"):
            movie = prefix.startswith("movie")
            for name, text in (("GroundTruth", truth), ("anonDataRatings", raters)):
                content = (text if movie else "").encode()
                info = tarfile.TarInfo(f"hutto_ICWSM_2014/{prefix}_{name}.txt")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    sdist = tmp_path / "package.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        info = tarfile.TarInfo("package/hutto_ICWSM_2014.tar.gz")
        info.size = len(inner.getvalue())
        archive.addfile(info, io.BytesIO(inner.getvalue()))
    assert [(s.text, s.mean, s.ratings) for s in read_ratings(sdist)["film review"]] == [
        ("A fine film.", 1.5, (1, 2)),
        ("Meh.", 0.0, (0,)),
    ]
