"""Sources of preference pairs, the canonical table and the contract that it must keep."""

import io
import tarfile

import datasets
import numpy as np
import pandas as pd
import pytest

from dpo.config import DataParams
from dpo.errors import InputError
from dpo.preferences import sources
from dpo.preferences.contract import check
from dpo.preferences.human_ratings import (
    EVAL_PHRASINGS,
    TRAIN_PHRASINGS,
    Rated,
    agreement,
    rating_pairs,
    read_ratings,
)
from dpo.preferences.sources import canonical, load_pairs


def data_params(**changes):
    defaults = {
        "source": "data/own/pairs.jsonl",
        "revision": None,
        "max_train_pairs": None,
        "max_eval_pairs": None,
        "eval_fraction": 0.25,
        "min_rating_gap": 1.0,
    }
    return DataParams(**{**defaults, **changes})


def raw_pairs(count=40):
    return pd.DataFrame(
        {
            "prompt": [f"prompt {i}" for i in range(count)],
            "chosen": [f"good {i}" for i in range(count)],
            "rejected": [f"bad {i}" for i in range(count)],
        }
    )


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/own").mkdir(parents=True)
    return tmp_path / "data/own"


def test_agreement_counts_wins_and_half_the_ties():
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
    check(table, "embedded")
    pd.testing.assert_frame_equal(table, rating_pairs(domains, min_rating_gap=1.0, eval_fraction=0.2, seed=3))


def test_ties_are_never_a_preference():
    tied = {"film review": [Rated(f"a/{i}", f"one two three four {i}", 1.0, (1,)) for i in range(40)]}
    assert (
        len(rating_pairs({**tied, "x": sentences("x", 40)}, min_rating_gap=0.0, eval_fraction=0.2, seed=1)) == 20
    )


def test_read_ratings_drops_disagreeing_means_and_repeats(tmp_path):
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


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_own_files_become_the_canonical_table(own, suffix):
    raw, path = raw_pairs(), own / f"pairs.{suffix}"
    if suffix == "jsonl":
        raw.to_json(path, orient="records", lines=True)
    elif suffix == "csv":
        raw.to_csv(path, index=False)
    else:
        raw.to_parquet(path)
    table = check(load_pairs(data_params(source=f"data/own/pairs.{suffix}"), seed=1), path.name)
    pd.testing.assert_frame_equal(table[["prompt", "chosen", "rejected"]], raw, check_dtype=False)
    assert table["id"].is_unique
    assert 0 < (table["split"] == "eval").sum() < 20


def test_a_hub_dataset_keeps_its_own_split(monkeypatch):
    asked = []

    def load_dataset(name, revision):
        asked.append((name, revision))
        return datasets.DatasetDict(
            {
                "train": datasets.Dataset.from_pandas(raw_pairs(6)),
                "test": datasets.Dataset.from_pandas(raw_pairs(9).tail(3).reset_index(drop=True)),
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table = load_pairs(data_params(source="someone/pairs", revision="abc"), seed=1)
    assert asked == [("someone/pairs", "abc")]
    assert table["split"].tolist() == ["train"] * 6 + ["eval"] * 3


def test_adding_rows_moves_no_old_row_to_the_other_split():
    few, many = canonical(raw_pairs(40), "x", 0.3), canonical(raw_pairs(400), "x", 0.3)
    assert few["split"].tolist() == many["split"].tolist()[:40]
    assert 60 < (many["split"] == "eval").sum() < 180


def test_caps_hold_in_each_split(own):
    raw_pairs(200).to_json(own / "pairs.jsonl", orient="records", lines=True)
    table = load_pairs(data_params(max_train_pairs=10, max_eval_pairs=5), seed=1)
    assert table["split"].value_counts().to_dict() == {"train": 10, "eval": 5}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"source": "data/own/missing.csv"}, ["data/own/missing.csv", "not a file"]),
        ({"source": "../pairs.csv"}, ["outside data/own", "copy the file"]),
        ({"source": "someone/pairs"}, ["someone/pairs", "data.revision"]),
        ({"source": "embedded", "revision": "main"}, ["data.revision has no effect"]),
        ({"source": "data/own/columns.csv", "revision": "main"}, ["data.revision has no effect"]),
        ({"source": "data/own/broken.parquet"}, ["broken.parquet", "not a readable"]),
        ({"source": "data/own/columns.csv"}, ["missing column 'rejected'", "'prompt'"]),
        ({"source": "data/own/number.jsonl"}, ["row 1", "field 'chosen'", "got 3"]),
    ],
)
def test_bad_sources_are_named_with_the_mend(own, params, words):
    (own.parent.parent / ".." / "pairs.csv").resolve().write_text("prompt\n")
    (own / "broken.parquet").write_bytes(b"PAR1 but not really")
    raw_pairs()[["prompt", "chosen"]].to_csv(own / "columns.csv")
    (own / "number.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 3, "rejected": "c"}\n'
    )
    with pytest.raises(InputError) as error:
        load_pairs(data_params(**params), seed=1)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("row", "field", "value", "rule"),
    [
        (2, "chosen", " \n", "str_matches"),
        (3, "rejected", None, "not_nullable"),
        (4, "rejected", "good 4 ", "chosen and rejected differ"),
        (5, "agreement", 1.5, "less_than_or_equal_to"),
        (6, "split", "test", "isin"),
        (7, "id", "same", "field_uniqueness"),
        (0, "chosen", "good 39", "no eval text was seen in training"),
        (0, "prompt", "prompt 39", "prompt is in one split only"),
    ],
)
def test_each_breach_of_the_contract_names_row_and_rule(monkeypatch, row, field, value, rule):
    monkeypatch.setenv("PANDERA_VALIDATION_ENABLED", "False")
    table = canonical(raw_pairs(), "x", 0.5)
    table["split"] = ["eval"] * 20 + ["train"] * 20
    check(table, "good")
    table.loc[row, field] = value
    if field == "id":
        table.loc[8, "id"] = value
    with pytest.raises(InputError) as error:
        check(table, "data/own/pairs.csv")
    message = str(error.value)
    assert "data/own/pairs.csv" in message
    assert f"row {row} (" in message
    assert rule in message


def test_an_empty_split_is_refused():
    table = canonical(raw_pairs(), "x", 0.5).assign(split="train")
    with pytest.raises(InputError, match="no pair is in split 'eval'"):
        check(table, "x")


def test_reader_of_hub_ids_is_the_datasets_library(monkeypatch):
    def absent(name, revision):
        raise datasets.exceptions.DatasetNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(InputError, match="cannot load 'a/b' at 'main'"):
        sources.load_pairs(data_params(source="a/b", revision="main"), seed=1)
