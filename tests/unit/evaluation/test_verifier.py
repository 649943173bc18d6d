"""The verifier: answers from prompts or from a table, and its scores."""

import math

import pandas as pd
import pytest

from dpo.common.errors import InputError
from dpo.evaluation.judges import load_judges
from dpo.evaluation.settings import VerifierSettings

PROMPT = "Work out 6 + 8 + 2 step by step."
RIGHT, WRONG = "6 + 8 = 14\n14 + 2 = 16\nAnswer: 16", "6 + 8 = 15\n15 + 2 = 17\nAnswer: 17"


def load(answers=None):
    (judge,) = load_judges([VerifierSettings(kind="verifier", answers=answers)])
    return judge


def test_answers_come_from_the_prompt():
    judge = load()
    assert judge.name == "verifier"
    turns = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": PROMPT}]
    assert judge.score([PROMPT, turns, PROMPT], [RIGHT, RIGHT, WRONG]) == [1.0, 1.0, 0.0]
    verdicts = judge.compare([PROMPT] * 3, [RIGHT, WRONG, "Answer: 16"], [WRONG, RIGHT, RIGHT])
    assert verdicts.to_dict("list") == {
        "win": [1.0, 0.0, 0.5],
        "score": [1.0, 0.0, 1.0],
        "other_score": [0.0, 1.0, 1.0],
        "right_work": [1.0, 0.0, 0.0],
    }
    with pytest.raises(InputError, match=r"evaluate.judges.0: cannot compute the answer to the prompt 'Hello'"):
        judge.score(["Hello"], [RIGHT])


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/own"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("answers", [["Paris", "4"], [7, 4]])
def test_answers_come_from_a_table(own, kind, answers):
    table = pd.DataFrame({"prompt": ["Capital?", "2 + 2?"], "answer": answers})
    if kind == "jsonl":
        table.to_json(own / "answers.jsonl", orient="records", lines=True)
    else:
        table.to_parquet(own / "answers.parquet")
    judge = load(f"data/own/answers.{kind}")
    verdicts = judge.compare(["2 + 2?", "Capital?"], ["Answer: 4", "Answer: Rome"], ["Answer: 5", "Answer: Rome"])
    assert verdicts["win"].tolist() == [1.0, 0.5]
    assert all(map(math.isnan, verdicts["right_work"]))
    with pytest.raises(InputError, match=r"answers: no answer to the prompt 'Why\?'"):
        judge.score(["Why?"], ["Answer: 4"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("data/own/a.csv", "", "is not a .parquet or .jsonl file under data/own/"),
        ("answers.jsonl", "", "is not a .parquet or .jsonl file under data/own/; move it to data/own/answers"),
        ("data/own/../a.jsonl", "", "is not a .parquet or .jsonl file under data/own/"),
        ("data/own/none.jsonl", None, "cannot be read"),
        ("data/own/a.jsonl", '{"prompt": "a"}', "cannot be read: 'answer'; it needs the columns"),
        ("data/own/a.jsonl", "{", "cannot be read"),
        ("data/own/a.parquet", "{", "cannot be read"),
        ("data/own/a.jsonl", '{"prompt": "a", "answer": null}', "1 rows have no prompt or no answer"),
        (
            "data/own/a.jsonl",
            '{"prompt": "a", "answer": 1}\n{"prompt": "a", "answer": 2}',
            "a prompt has two answers",
        ),
    ],
)
def test_an_unusable_table_is_an_error_at_load_time(own, name, text, words):
    if text is not None:
        (own.parents[1] / name).write_text(text)
    with pytest.raises(InputError, match=f"params.yaml: evaluate.judges.0.answers: .*{words}"):
        load(name)
