"""Problems of reasoning-gym: right and wrong answers, splits, seeds, and the verifier that scores them."""

import json
import sys

import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data.reasoning import Generator, reasoning_rows, stated_answer
from dpo.data.settings import DataSettings, ReasoningProblems
from dpo.data.sources import read_source
from dpo.evaluation.judges import load_judge
from dpo.evaluation.settings import VerifierSettings
from tests.support.project import ROOT


def problems(**changes):
    return ReasoningProblems(**{"generator": "chain_sum", "problems": 60, "seed": 17, **changes})


def installed():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra `reasoning`)")


def test_the_last_stated_answer_counts():
    assert stated_answer("Answer: 3") == "3"
    assert stated_answer("Answer: 3\nNo.\nAnswer: 4\n") == "4"
    assert stated_answer("Answer: 1 2\n3 4") == "1 2\n3 4"
    assert stated_answer("The Answer: 3") is None
    assert stated_answer("") is None


def test_rows_are_pairs_of_a_right_and_a_wrong_answer():
    installed()
    rows, generator = list(reasoning_rows(problems(), 0.2, "data.source")), Generator(problems(), "data.source")
    assert len({row["prompt"] for row in rows}) == len(rows) >= 55
    assert {row["split"] for row in rows} == {"train", "eval"}
    for row in rows:
        entry = generator.entries[row["prompt"]]
        assert generator.is_right(stated_answer(row["chosen"]), entry)
        assert not generator.is_right(stated_answer(row["rejected"]), entry)


def test_close_seeds_share_no_problem_by_their_place():
    installed()
    first, second = (set(Generator(problems(seed=seed), "data.source").entries) for seed in (17, 18))
    assert len(first & second) <= 2


def test_only_a_score_of_exactly_one_is_right():
    installed()
    generator = Generator(problems(), "data.source")
    question, entry = next(iter(generator.entries.items()))
    judge = load_judge(VerifierSettings(kind="verifier", problems=problems()), "feedback")
    answer = entry["answer"]
    responses = [f"So:\nAnswer: {answer}", f"Answer: the answer is {answer}", answer, "Answer: none"]
    assert judge.score([question] * 4, responses) == [1.0, 0.0, 0.0, 0.0]
    with pytest.raises(InputError, match=r"feedback: no problem with the prompt 'Why\?'"):
        judge.score(["Why?"], ["Answer: 1"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generator": "absent"}, "reasoning_gym:absent: .*correct the name"),
        ({"difficulty": {"absent": 1}}, "absent"),
    ],
)
def test_a_wrong_name_or_setting_is_an_error(changes, words):
    installed()
    with pytest.raises(InputError, match=f"params.yaml: data.source: .*{words}"):
        Generator(problems(**changes), "data.source")


def test_a_missing_package_is_an_error_that_names_the_fix(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    settings = {"source": "reasoning_gym:chain_sum"}
    params = TypeAdapter(DataSettings).validate_json(json.dumps(settings))
    with pytest.raises(InputError, match=r"data.source: reasoning_gym:chain_sum needs the package reasoning-gym"):
        list(read_source(params, 17))


def test_a_verifier_takes_the_problems_of_the_data(tmp_path):
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values["data"] |= {"source": "reasoning_gym:chain_sum", "reasoning": {"problems": 50, "difficulty": {"a": 1}}}
    values["evaluate"]["judges"] = [{"kind": "verifier"}]
    values |= {"feedback": {"kind": "verifier"}, "seed": 5}
    YAML().dump(values, tmp_path / "params.yaml")
    params = load_params(tmp_path / "params.yaml")
    expected = ReasoningProblems(generator="chain_sum", problems=50, seed=5, difficulty={"a": 1})
    assert params.feedback.problems == params.evaluate.judges[0].problems == expected
