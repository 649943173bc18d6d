"""Check of new files together with the data of the project."""

import json
from pathlib import Path

import pandas as pd
import pytest

from dpo.common.errors import InputError
from dpo.config import load_params
from tasks.commands.landed import Checker
from tests.support.project import ROOT, book_pairs, change

LANDED = Path("data/own/landed")


def swapped(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename(columns={"chosen": "rejected", "rejected": "chosen"})


def longer(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(chosen=table["chosen"] + " And many more words that make it the longer one.")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    change(tmp_path, {"data.source": [str(LANDED)], "validate.rules": {"length_bias": "error"}})
    LANDED.mkdir(parents=True)
    return tmp_path


def check(here: Path, files: dict[str, pd.DataFrame | str]):
    """Return the results by name, and the rows of the files to take in."""
    (here / "tables").mkdir(exist_ok=True)
    (here / "incoming").mkdir(exist_ok=True)
    request = {}
    for name, content in files.items():
        path = here / "incoming" / f"0-{name}"
        if isinstance(content, str):
            path.write_text(content)
        else:
            content.to_json(path, orient="records", lines=True)
        request[path] = f"landing/{name}"
    found = Checker(load_params(), here / "tables").check(request)
    return {Path(path).name[2:]: result for path, result in found.items()}


def test_each_file_is_judged_with_the_data_and_the_files_before_it(here):
    book_pairs(0).to_json(LANDED / "old.jsonl", orient="records", lines=True)
    found = check(
        here,
        {
            "a.jsonl": book_pairs(100),
            "contradicts-a.jsonl": swapped(book_pairs(100)),
            "contradicts-old.jsonl": swapped(book_pairs(0)),
            "biased.jsonl": longer(book_pairs(200, 60)),
            "broken.jsonl": '{"prompt": "What?", "answer": "No pair."}\n',
            "z.jsonl": book_pairs(300),
        },
    )
    reasons = {name: result["reason"] for name, result in found.items() if "reason" in result}
    assert set(found) - set(reasons) == {"a.jsonl", "z.jsonl"}
    assert reasons["contradicts-a.jsonl"].startswith("landing/contradicts-a.jsonl, line 1: ")
    assert "20 of 20 rows are invalid (contradiction 20)" in reasons["contradicts-old.jsonl"]
    assert "length_bias" in reasons["biased.jsonl"]
    assert reasons["broken.jsonl"].startswith("landing/broken.jsonl: ")


def test_rows_that_the_data_has_are_dropped_and_counted(here):
    book_pairs(0).to_json(LANDED / "old.jsonl", orient="records", lines=True)
    export = pd.concat([book_pairs(0), book_pairs(100)])
    found = check(here, {"export.jsonl": export, "later.jsonl": pd.concat([export, book_pairs(200)])})
    counts = {name: (result["rows"], result["known"]) for name, result in found.items()}
    assert counts == {"export.jsonl": (40, 20), "later.jsonl": (60, 40)}
    kept = [json.loads(line)["prompt"] for line in Path(found["later.jsonl"]["path"]).read_text().splitlines()]
    assert kept == book_pairs(200)["prompt"].tolist()
    assert check(here, {"same.jsonl": book_pairs(0, 4)})["same.jsonl"]["known"] == 4


def test_a_fault_that_the_data_has_without_the_files_refuses_no_file(here):
    book_pairs(0).to_json(LANDED / "old.jsonl", orient="records", lines=True)
    longer(book_pairs(50, 60)).to_json(LANDED / "biased.jsonl", orient="records", lines=True)
    with pytest.raises(InputError, match=r"the data is invalid without the new files:\n.*length_bias"):
        check(here, {"a.jsonl": book_pairs(100, 4)})


def test_a_fault_that_a_plain_pair_has_refuses_no_file(here, tiny_model_dir):
    (here / "models").mkdir()
    (here / "models/base").symlink_to(tiny_model_dir)
    change(here, {"engine.max_length": 4, "evaluate.max_new_tokens": 2})
    with pytest.raises(InputError, match=r"a plain pair breaks a rule: .*completion"):
        check(here, {"a.jsonl": book_pairs(0)})


def test_files_above_a_limit_of_size_or_time_are_refused(here, monkeypatch):
    change(here, {"run.landed_mib": 0.01})
    found = check(here, {"large.jsonl": book_pairs(0, 200), "small.jsonl": book_pairs(300)})
    assert "landing/large.jsonl: more than 0.01 MiB" in found["large.jsonl"]["reason"]
    assert found["small.jsonl"]["known"] == 0
    change(here, {"run.landed_mib": 10, "run.landed_minutes": 1e-7})
    assert (
        "not read after 1e-07 minutes" in check(here, {"slow.jsonl": book_pairs(0, 200)})["slow.jsonl"]["reason"]
    )


def test_one_bad_file_among_many_is_found_by_bisection(here, monkeypatch):
    validations = []
    validate = Checker._validate

    def counted(self, table):
        validations.append(table)
        return validate(self, table)

    monkeypatch.setattr(Checker, "_validate", counted)
    files = {f"{number:03}.jsonl": book_pairs(number * 10, 2) for number in range(1, 65)}
    found = check(here, {**files, "biased.jsonl": longer(book_pairs(5000, 300))})
    assert [name for name, result in found.items() if "reason" in result] == ["biased.jsonl"]
    assert len(validations) <= 18
