"""Validation of random rows: every row is accepted or quarantined."""

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from dpo.common.errors import InputError
from tasks.report import validation as report
from tests.support.examples import examples
from tests.support.validation import PARAMS, ROWS, check, ids, lines_of

WORDS = st.sampled_from(
    ["", " ", "Film 1?", "A joy.", "A bore.", "a JOY.", "cafÃ©", "日本語", "🎬", "<|im_end|>", "\x00"]
)
TEXTS = WORDS | st.text(max_size=12) | st.text(st.characters(categories=["Cs", "Cc"]), max_size=2)
LEAVES = TEXTS | st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400)
ROLES = st.sampled_from(["user", "assistant", "system", "critic", None, 3, []])
TURNS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS | LEAVES}), max_size=4)
VALUES = st.recursive(
    LEAVES | TURNS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "score", "rating"]) | TEXTS, inner, max_size=3
        )
    ),
    max_leaves=6,
)
FIELDS = [
    "prompt",
    "instruction",
    "chosen",
    "rejected",
    "id",
    "split",
    "source",
    "timestamp",
    "weight",
    "agreement",
]
FIELDS += ["chosen_rating", "completions", "responses", "scores", "ratings", "ranks", "turns", "label"]
SHAPED = st.fixed_dictionaries(
    {"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS},
    optional={
        "id": WORDS,
        "split": st.sampled_from(["train", "eval", "test", "x"]),
        "source": TEXTS,
        "weight": st.floats() | st.integers(),
        "agreement": st.floats(0, 1) | VALUES,
        "timestamp": VALUES,
    },
)
RATED = st.fixed_dictionaries({"prompt": TEXTS, "responses": VALUES | st.lists(TEXTS), "scores": VALUES})
BROKEN = st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"") + b"\n")
ANY_ROW = SHAPED | st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6) | RATED | BROKEN


def assert_complete(folder, rows, tokenizer=None):
    """Check that each row is accepted or quarantined, or that the input is rejected."""
    content = [line for line in lines_of(rows).removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    try:
        result, tables = check(folder, rows, tokenizer=tokenizer)
    except InputError:
        return
    raw = pd.read_parquet(folder / "raw_pairs.parquet")
    removed = tables["quarantine"]
    metrics = result.metrics
    assert len(raw) == raw["line"].nunique() == metrics["rows"] == len(content)
    assert metrics["rows"] == metrics["accepted"] + metrics["quarantined"]
    assert removed["line"].nunique() == len(removed) == metrics["quarantined"]
    assert removed[["rule", "reason", "file", "original"]].notna().all(axis=None)
    if not result.errors:
        kept = raw[~raw["line"].isin(removed["line"])]
        assert sorted(ids(kept)) == sorted([*ids(tables["train"]), *ids(tables["eval"])])
        assert not set(tables["train"]["prompt"]) & set(tables["eval"]["prompt"])
    assert len(report.table(result, PARAMS, folder).splitlines()) <= 20
    report.markdown(result, PARAMS)
    report.write_report(result, PARAMS, folder / "report.html")


@examples(40)
@given(rows=st.lists(ANY_ROW, min_size=1, max_size=12))
def test_valid_and_random_rows_are_accepted_or_quarantined(tmp_path_factory, rows):
    assert_complete(tmp_path_factory.mktemp("any"), [*ROWS[:5], *rows])


@examples(15)
@given(rows=st.lists(ANY_ROW, min_size=1, max_size=4))
def test_random_rows_are_rejected_accepted_or_quarantined(tmp_path_factory, rows):
    assert_complete(tmp_path_factory.mktemp("any"), rows)


@examples(15)
@given(rows=st.lists(SHAPED, min_size=1, max_size=8))
def test_random_texts_with_a_tokenizer_are_accepted_or_quarantined(tmp_path_factory, tiny_model_dir, rows):
    assert_complete(tmp_path_factory.mktemp("any"), [*ROWS[:5], *rows], tokenizer=tiny_model_dir)
