"""Arithmetic: problems, right and wrong work, and the split by problem."""

from collections import defaultdict

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data.arithmetic import arithmetic_rows, is_right, read_problem, work, work_is_right
from dpo.data.ingest import write_raw_pairs
from dpo.data.settings import ArithmeticSettings, DataSettings
from dpo.data.sources import read_source
from tests.support.examples import examples
from tests.support.project import ROOT


def rows(seed=17, **settings):
    return list(arithmetic_rows(ArithmeticSettings(**settings), 0.1, seed))


def test_a_problem_is_worked_step_by_step():
    assert work([6, "+", 8, "+", 2]) == ["6 + 8 = 14", "14 + 2 = 16", "Answer: 16"]
    assert work([6, "-", 8, "*", 2]) == ["8 * 2 = 16", "6 - 16 = -10", "Answer: -10"]
    assert work([6, "+", 8, "+", 2], 0, 1) == ["6 + 8 = 15", "15 + 2 = 17", "Answer: 17"]


@pytest.mark.parametrize(
    "settings",
    [
        {"problems": 4000},
        {"problems": 500, "terms": 2, "digits": 2, "operators": ("*",)},
        {"problems": 500, "terms": 6, "digits": 3, "operators": ("+", "-", "*")},
    ],
)
def test_chosen_is_right_and_rejected_is_wrong(settings):
    made = rows(**settings)
    assert len({row["prompt"] for row in made}) == settings["problems"]
    for row in made:
        problem = read_problem(row["prompt"])
        expression = row["prompt"].removeprefix("Work out ").removesuffix(" step by step.")
        answer = str(eval(expression))
        assert is_right(answer, row["chosen"])
        assert work_is_right(problem, row["chosen"])
        assert not is_right(answer, row["rejected"])
        assert not work_is_right(problem, row["rejected"])


def test_the_seed_decides_the_problems():
    assert rows() == rows() != rows(seed=18)
    assert {row["prompt"] for row in rows(problems=4000)} == {row["prompt"] for row in rows(18, problems=4000)}


def test_problems_that_differ_only_in_order_are_in_one_split():
    splits = defaultdict(set)
    for row in rows(problems=3000, terms=3, operators=("+", "*")):
        products = row["prompt"].removeprefix("Work out ").removesuffix(" step by step.").split(" + ")
        splits[tuple(sorted(tuple(sorted(product.split(" * "))) for product in products))].add(row["split"])
    assert all(len(split) == 1 for split in splits.values())
    assert any(len(split) == 1 and "eval" in split for split in splits.values())
    share = pd.Series([row["split"] for row in rows(problems=4000)]).eq("eval").mean()
    assert 0.05 < share < 0.15


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(InputError, match=r"data.arithmetic.problems: 101, but there are only 100 problems of 2"):
        rows(problems=101, terms=2, digits=1, operators=("+",))


RIGHT = "6 + 8 = 14\n14 + 2 = 16\nAnswer: 16"


@pytest.mark.parametrize(
    ("response", "right", "right_work"),
    [
        (RIGHT, True, True),
        (RIGHT + "\n", True, True),
        ("Answer: 16", True, False),
        ("6 + 8 = 15\n15 + 1 = 16\nAnswer: 16", True, False),
        ("6 + 8 = 14\n2 + 2 = 4\nAnswer: 16", True, False),
        ("6 + 8 = 14\n14 + 2 = 16\nAnswer: 17", False, False),
        ("6 + 8 = 14\n14 + 3 = 17\nAnswer: 17", False, False),
        ("8 + 8 = 16\n16 + 0 = 16\nAnswer: 16", True, False),
        ("8 + 2 = 10\n6 + 10 = 16\nAnswer: 16", True, True),
        ("8 + 2 = 10\n10 - 6 = 4\nAnswer: 4", False, True),
        (RIGHT + " ", False, False),
        (RIGHT + ".", False, False),
        (RIGHT + "\n\n", False, False),
        (RIGHT + "\nThat is all.", False, False),
        (RIGHT.replace("Answer: 16", "answer: 16"), False, False),
        (RIGHT.replace("Answer: 16", "Answer: 016"), False, False),
        (RIGHT.replace("Answer: 16", "Answer: 16.0"), False, False),
        (RIGHT.replace("Answer: 16", "The answer is 16"), False, False),
        (f"{'9' * 5000} + 8 = 14\n14 + 2 = 16\nAnswer: 16", True, False),
        ("", False, False),
    ],
)
def test_only_an_exact_last_line_is_right(response, right, right_work):
    assert is_right("16", response) is right
    assert work_is_right([6, "+", 8, "+", 2], response) is right_work


@examples(200)
@given(st.text())
def test_any_text_can_be_checked(text):
    assert not work_is_right([6, "+", 8], text) or text.split("\n")[1].startswith("Answer: ")
    assert read_problem(text) is None or "Work out" in text


def test_ingest_writes_the_pairs_with_their_split(tmp_path):
    data = DataSettings(source="arithmetic", arithmetic=ArithmeticSettings(problems=50))
    write_raw_pairs(read_source(data, 17), tmp_path / "raw.parquet", data.origin, data)
    table = pd.read_parquet(tmp_path / "raw.parquet")
    assert table[["prompt", "chosen", "rejected", "split"]].to_dict("records") == [
        {name: row[name] for name in ("prompt", "chosen", "rejected", "split")} for row in rows(problems=50)
    ]
    with pytest.raises(InputError, match=r"data.revision has no effect"):
        read_source(DataSettings(source="arithmetic", revision="main"), 17)


def test_demonstrations_of_arithmetic_are_the_chosen_completions(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(
        (ROOT / "params.yaml").read_text().replace("  completions: both ", "  source: arithmetic\n  #")
    )
    with pytest.raises(InputError, match=r"sft.source: arithmetic: .* set sft.source to null"):
        load_params(path)
