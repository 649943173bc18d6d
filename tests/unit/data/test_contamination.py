"""Pairs that contain a text of a benchmark."""

import json

import pytest

from dpo.data.contamination import RUN, SHORTEST, benchmark_runs, contaminated
from tests.support.validation import ROWS, check, row

LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHORT = "What is the capital of the river's largest state?"


def found(folder, prompt="Say.", chosen="Yes.", rejected="No."):
    (result,) = contaminated([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], benchmark_runs(folder))
    return result


@pytest.fixture
def benchmarks(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "math.jsonl").write_text(json.dumps({"question": LONG, "options": [{"text": SHORT}], "level": 3}))
    (folder / "lines.txt").write_text("Too short.\nEvery one of these eight words is needed.\n")
    (folder / "README.md").write_text("What a benchmark is and which of them are in this folder of texts.")
    benchmark_runs.cache_clear()
    return folder


def test_a_text_is_found_in_any_field_without_case_and_punctuation(benchmarks):
    for field in ("prompt", "chosen", "rejected"):
        for text in (LONG, LONG.upper().replace(",", ""), f"Answer this: {SHORT} Please.", f"Once {LONG} Again."):
            assert found(benchmarks, **{field: text})
    assert found(benchmarks, prompt="every one of THESE eight words is needed")


def test_a_run_of_words_is_enough_and_one_word_less_is_not(benchmarks):
    words = LONG.split()
    assert found(benchmarks, chosen=" ".join(words[3 : 3 + RUN]))
    assert not found(benchmarks, chosen=" ".join(words[3 : 2 + RUN]))
    assert not found(benchmarks, prompt=" ".join(SHORT.split()[:-1])), "a short text is compared as a whole"
    assert len(SHORT.split()) >= SHORTEST


def test_runs_do_not_span_two_texts_and_other_files_are_not_read(benchmarks, tmp_path):
    words = LONG.split()
    assert not found(benchmarks, prompt=" ".join(words[:10]), chosen=" ".join(words[10:]))
    assert not found(benchmarks, prompt="What a benchmark is and which of them are in this folder of texts.")
    assert benchmark_runs(tmp_path / "absent") == {}


def test_a_contaminated_pair_is_quarantined(benchmarks, tmp_path):
    _, tables = check(tmp_path, [*ROWS, row(100, prompt=LONG)])
    assert tables["quarantine"][["id", "rule"]].to_numpy().tolist() == [["p100", "contaminated"]]
    assert "natalia sold clips" in tables["quarantine"]["reason"].iloc[0].casefold()
