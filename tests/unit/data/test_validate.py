"""Validation: every row is accepted or quarantined."""

import dataclasses
import re

import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from dpo.data import ingest as ingest_module
from dpo.data.rules import RULES
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA
from dpo.data.summary import wilson_interval
from dpo.data.validate import EXAMPLES, MAX_SERIAL_GROUPS
from dpo.engine.chat import read_turns
from tasks.report import validation as report
from tests.support.models import chat_tokenizer
from tests.support.validation import BAD, LONG, PARAMS, ROWS, SPLITS, check, ids, lines_of, row, settings_of


@pytest.mark.parametrize("rule", [rule for rule in BAD if rule not in ("contradiction", "near_duplicate_pair")])
def test_a_row_that_breaks_a_rule_is_quarantined_unchanged(tmp_path, tiny_model_dir, rule):
    rows = [*ROWS, BAD[rule]]
    result, tables = check(tmp_path, rows, tokenizer=tiny_model_dir, max_length=150)
    (removed,) = tables["quarantine"].to_dict("records")
    assert removed["rule"] == rule
    assert removed["reason"]
    assert removed["file"] == str(tmp_path / "data.jsonl")
    assert removed["line"] == 13
    assert removed["original"] == lines_of(rows).splitlines()[-1].strip().decode(errors="backslashreplace")
    assert {**result.metrics["rules"], rule: 0} == dict.fromkeys(RULES, 0)
    assert result.metrics["rules"][rule] == 1
    assert (result.metrics["rows"], result.metrics["accepted"], result.metrics["quarantined"]) == (13, 12, 1)
    (example,) = result.examples[rule]
    assert (example["line"], example["rule"], example["reason"]) == (13, rule, removed["reason"])
    assert result.errors == []
    assert ids(tables["train"]) == [r["id"] for r in ROWS if r["split"] == "train"]
    assert ids(tables["eval"]) == [r["id"] for r in ROWS if r["split"] == "eval"]


def test_a_completion_that_is_too_long_names_the_length_that_takes_all_rows(tmp_path, tiny_model_dir):
    rows = [*ROWS, BAD["completion_too_long"]]
    settings = settings_of(completion_too_long="error")
    result, tables = check(tmp_path / "error", rows, settings, tokenizer=tiny_model_dir, max_length=150)
    assert set(tables) == {"quarantine"}
    (error,) = result.errors
    assert (error.code, error.rule) == ("rule_broken", "completion_too_long")
    needed = int(re.search(r"engine.max_length: (\d+) takes all completions", error.message)[1])
    result, tables = check(tmp_path / "enough", rows, settings, tokenizer=tiny_model_dir, max_length=needed)
    assert result.metrics["rules"]["completion_too_long"] == 0
    assert result.errors == []


def test_contradictions_quarantine_both_rows_and_near_duplicates_the_second(tmp_path):
    rows = [*ROWS, BAD["contradiction"], row(100, **LONG, id="first"), BAD["near_duplicate_pair"]]
    result, tables = check(tmp_path, rows)
    assert tables["quarantine"][["id", "rule"]].to_numpy().tolist() == [
        ["p1", "contradiction"],
        ["p100", "contradiction"],
        ["twin", "near_duplicate_pair"],
    ]
    assert result.metrics["rules"]["contradiction"] == 2
    assert [example["id"] for example in result.examples["contradiction"]] == ["p1", "p100"]


@pytest.mark.parametrize("rule", ["control_characters", "special_tokens", "prompt_truncated", "duplicate_pair"])
def test_warn_counts_and_accepts_the_row(tmp_path, tiny_model_dir, rule):
    params = settings_of(**{rule: "warn"})
    result, tables = check(tmp_path, [*ROWS, BAD[rule]], params, tokenizer=tiny_model_dir, max_length=150)
    assert result.errors == []
    assert result.metrics["rules"][rule] == 1
    assert result.metrics["quarantined"] == len(tables["quarantine"]) == 0
    kept = pd.concat([tables["train"], tables["eval"]]).set_index("id").loc[BAD[rule]["id"]]
    assert kept["prompt"] == BAD[rule]["prompt"]
    assert result.examples[rule][0]["id"] == BAD[rule]["id"]


@pytest.mark.parametrize("rule", ["wrong_type", "mojibake", "duplicate_id"])
def test_error_writes_no_training_data(tmp_path, rule):
    result, tables = check(tmp_path, [*ROWS, BAD[rule]], settings_of(**{rule: "error"}))
    (error,) = result.errors
    file, _, rest = error.message.partition(", line 13: ")
    assert file.endswith("data.jsonl")
    assert rest.endswith(f"; {RULES[rule].fix} (rule '{rule}', 1 in total)")
    assert (error.code, error.rule, error.split) == ("rule_broken", rule, None)
    assert result.to_json()["errors"] == [{"code": "rule_broken", "message": error.message, "rule": rule}]
    assert set(tables) == {"quarantine"}
    assert tables["quarantine"]["rule"].tolist() == [rule]


def test_error_keeps_the_training_data_of_an_earlier_run(tmp_path):
    check(tmp_path, ROWS)
    before = (tmp_path / "train.parquet").read_bytes()
    check(tmp_path, [*ROWS, BAD["mojibake"]], settings_of(mojibake="error"))
    assert (tmp_path / "train.parquet").read_bytes() == before


@pytest.mark.parametrize(("most", "stops"), [(0.25, False), (0.249, True), (0, True), (1, False)])
def test_too_many_quarantined_rows_are_an_error(tmp_path, most, stops):
    rows = [*ROWS[:9], *(row(i, chosen="") for i in range(20, 23))]
    result, tables = check(tmp_path, rows, settings_of(max_quarantined=most))
    assert bool(result.errors) == stops == ("train" not in tables)
    assert [error.code for error in result.errors] == ["too_many_quarantined"] * stops
    assert all("validate.max_quarantined" in error.message for error in result.errors)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_valid_pairs_is_an_error(tmp_path, split):
    rows = [r for r in ROWS if r["split"] != split] + [row(50, split=split, chosen="")]
    result, tables = check(tmp_path, rows)
    (error,) = result.errors
    assert (error.code, error.split, error.rule) == ("empty_split", split, None)
    assert f"split '{split}'" in error.message
    assert result.to_json()["errors"] == [{"code": "empty_split", "message": error.message, "split": split}]
    assert set(tables) == {"quarantine"}


def test_data_without_valid_pairs_is_reported(tmp_path):
    result, tables = check(tmp_path, [row(i, chosen="") for i in range(7)])
    assert [error.split for error in result.errors] == ["train", "eval"]
    assert result.summary.profile == {"origin": "data"}
    assert result.metrics["accepted"] == 0
    assert len(tables["quarantine"]) == 7
    assert len(result.examples["empty_completion"]) == EXAMPLES
    assert "7 quarantined" in report.table(result, PARAMS, tmp_path)
    report.write_report(result, PARAMS, tmp_path / "report.html")


def test_every_row_of_the_source_is_in_exactly_one_table(tmp_path):
    rows = [*ROWS, *BAD.values(), row(100, **LONG, id="late")]
    result, tables = check(tmp_path, rows)
    raw = pd.read_parquet(tmp_path / "raw_pairs.parquet")
    assert result.metrics["rows"] == len(raw) == len(rows)
    assert sum(map(len, tables.values())) == len(rows)
    kept = raw[~raw["line"].isin(tables["quarantine"]["line"])]
    assert sorted(ids(kept)) == sorted([*ids(tables["train"]), *ids(tables["eval"])])
    for name in SPLITS:
        assert pq.read_schema(tmp_path / f"{name}.parquet").names == PAIRS_SCHEMA.names
        assert set(tables[name]["split"]) == {name}
        assert result.metrics[name]["pairs"] == result.metrics[name]["used"] == len(tables[name])
    assert pq.read_schema(tmp_path / "quarantine.parquet").names == RAW_PAIRS_SCHEMA.names
    assert tables["quarantine"][["rule", "reason", "original"]].notna().all(axis=None)


def test_caps_limit_the_pairs_and_the_seed_decides_which(tmp_path):
    rows = [row(i) for i in range(80)]
    drawn = {}
    for seed in (1, 1, 2):
        result, tables = check(tmp_path, rows, caps={"train": 10, "eval": 1000}, seed=seed)
        assert len(tables["train"]) == result.metrics["train"]["used"] == 10
        assert len(tables["eval"]) == result.metrics["eval"]["used"] == result.metrics["eval"]["pairs"] == 20
        assert result.metrics["train"]["pairs"] == 60
        assert result.metrics["accepted"] == 80
        assert ids(tables["train"]) == sorted(ids(tables["train"]), key=lambda name: int(name[1:]))
        assert drawn.setdefault(seed, ids(tables["train"])) == ids(tables["train"])
    assert drawn[1] != drawn[2]
    assert max(int(name[1:]) for name in drawn[1]) > 20


def longer(number, side, **changes):
    return row(number, **{side: f"word{number} and{number} many{number} more{number}"}, **changes)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_length_bias_is_reported(tmp_path, side):
    rows = [longer(i, side) for i in range(40)]
    result, _ = check(tmp_path, rows)
    ((rule, reason),) = result.summary.notices
    assert rule == "length_bias"
    assert reason.startswith(f"{side} is the longer one in 100% of pairs")
    assert result.metrics["rules"]["length_bias"] == 1
    assert result.metrics["chosen_longer"]["share"] == (side == "chosen")
    assert result.errors == []
    result, tables = check(tmp_path / "error", rows, settings_of(length_bias="error"))
    assert result.errors[0].rule == "length_bias"
    assert set(tables) == {"quarantine"}


def test_balanced_lengths_are_not_reported(tmp_path):
    result, _ = check(tmp_path, [row(i) for i in range(40)])
    assert result.summary.notices == []
    assert result.metrics["chosen_longer"]["share"] == 0.5
    assert 0.3 < result.metrics["chosen_longer"]["low"] < 0.5 < result.metrics["chosen_longer"]["high"] < 0.7


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (1, 1), (3, 10), (512, 900), (900, 900)])
def test_the_interval_of_a_share_equals_that_of_scipy(successes, trials):
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_pairs_of_equal_length_have_no_length_bias(tmp_path):
    result, _ = check(tmp_path, [row(i, chosen=f"aaa{i}", rejected=f"bbb{i}") for i in range(40)])
    assert result.metrics["chosen_longer"] is None
    assert result.metrics["sources"]["data.jsonl"]["chosen_longer"] is None
    assert result.summary.notices == []
    report.write_report(result, PARAMS, tmp_path / "report.html")


def test_source_imbalance_is_reported(tmp_path):
    rows = [
        *(row(i, source="even") for i in range(160)),
        *(row(i, source="one split", split="train") for i in range(200, 224)),
        *(longer(i, "chosen", source="biased") for i in range(300, 324)),
        *(longer(i, "chosen", source="few", split="train") for i in range(400, 410)),
    ]
    result, _ = check(tmp_path, rows)
    assert {rule for rule, _ in result.summary.notices} == {"source_imbalance"}
    reasons = [reason for _, reason in result.summary.notices]
    assert len(reasons) == result.metrics["rules"]["source_imbalance"] == 2
    assert "source 'one split': all of its 24 pairs are in one split" in reasons
    assert any(reason.startswith("source 'biased': chosen is the longer one in 100%") for reason in reasons)
    assert result.metrics["sources"]["even"] == {"pairs": 160, "eval": 40, "chosen_longer": 0.5}


def test_a_single_source_is_never_imbalanced(tmp_path):
    result, _ = check(tmp_path, [row(i, source="only", split="train") for i in range(30)])
    assert result.summary.notices == []


def test_drift_from_an_earlier_version_is_reported(tmp_path):
    old = [
        row(i, prompt=f"{('Film', 'Book', 'Song', 'Play')[i % 4]} {i % 4 + 1}, in {i} words") for i in range(80)
    ]
    before, _ = check(tmp_path / "before", old)
    assert "drift" not in before.metrics
    same, _ = check(tmp_path / "same", old, previous=before.summary.profile)
    assert same.metrics["drift"] == pytest.approx(dict.fromkeys(same.metrics["drift"], 0), abs=1e-9)
    assert same.summary.notices == []
    rows = [row(i, prompt=f"Write about soup number {i} please", source="new") for i in range(80)]
    other, _ = check(tmp_path / "other", rows, previous=before.summary.profile)
    drifted = [reason.split(":")[0] for rule, reason in other.summary.notices if rule == "drift"]
    assert {"prompt_tokens", "sources", "prompts"} <= set(drifted)
    assert other.metrics["rules"]["drift"] == len(drifted)
    assert other.errors == []
    error, _ = check(tmp_path / "error", rows, settings_of(drift="error"), previous=before.summary.profile)
    assert f"rule 'drift', {len(drifted)} in total" in error.errors[0].message


def test_drift_needs_lengths_in_the_same_unit(tmp_path, tiny_model_dir):
    before, _ = check(tmp_path / "before", ROWS)
    after, _ = check(tmp_path / "after", ROWS, tokenizer=tiny_model_dir, previous=before.summary.profile)
    assert (before.metrics["unit"], after.metrics["unit"]) == ("characters", "tokens")
    assert "drift" not in after.metrics
    foreign, _ = check(tmp_path / "after", ROWS, previous={"something": "else"})
    assert "drift" not in foreign.metrics


def test_without_a_tokenizer_lengths_are_in_characters(tmp_path):
    result, _ = check(tmp_path, [row(i, prompt=f"{i:05}", chosen=f"é🎬{i:03}") for i in range(8)], max_length=3)
    assert result.metrics["lengths"]["prompt"] == {"median": 5, "p90": 5, "p99": 5, "max": 5}
    assert result.metrics["lengths"]["chosen"]["max"] == 5
    assert result.errors == []


def test_human_ceiling_is_the_mean_agreement_of_the_used_pairs(tmp_path):
    rows = [row(i, **({"agreement": 0.6 + i / 100} if i % 4 and i < 8 else {})) for i in range(12)]
    result, tables = check(tmp_path, rows)
    known = [0.6 + i / 100 for i in (1, 2, 3, 5, 6, 7)]
    assert result.metrics["train"]["human_ceiling"] == pytest.approx(sum(known) / 6)
    assert result.metrics["eval"]["human_ceiling"] is None
    result, tables = check(tmp_path, rows, caps={"train": 4, "eval": 1})
    assert result.metrics["train"]["human_ceiling"] == pytest.approx(tables["train"]["agreement"].mean())


def same(one, other):
    (result, tables), (again, others) = one, other
    facts, others_facts = (dataclasses.asdict(dataclasses.replace(x, held_out=None)) for x in (result, again))
    assert facts == others_facts
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, others[name])


MANY = [
    *ROWS,
    *(row(i) for i in range(20, 60)),
    *(bad for rule, bad in BAD.items() if rule != "completion_too_long"),
]


def test_two_row_groups_give_the_same_result_as_one(tmp_path, monkeypatch, tiny_model_dir):
    single = check(tmp_path, MANY, tokenizer=tiny_model_dir, caps={"train": 20, "eval": None})
    monkeypatch.setattr(ingest_module, "GROUP_ROWS", len(MANY) // 2 + 1)
    parts = check(tmp_path, MANY, tokenizer=tiny_model_dir, caps={"train": 20, "eval": None})
    assert pq.ParquetFile(tmp_path / "raw_pairs.parquet").num_row_groups == 2
    same(single, parts)


@pytest.mark.slow
def test_several_processes_give_the_same_result_as_one(tmp_path, monkeypatch, tiny_model_dir):
    single = check(tmp_path, MANY, tokenizer=tiny_model_dir)
    monkeypatch.setattr(ingest_module, "GROUP_ROWS", 5)
    parts = check(tmp_path, MANY, tokenizer=tiny_model_dir)
    assert pq.ParquetFile(tmp_path / "raw_pairs.parquet").num_row_groups > MAX_SERIAL_GROUPS
    same(single, parts)


def test_conversations_keep_their_turns(tmp_path, tiny_model_dir):
    def conversation(number):
        return [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Film {number}?"},
            {"role": "assistant", "content": "Which one?"},
            {"role": "user", "content": "Guess."},
        ]

    def answer(number, text):
        return {"role": "assistant", "content": f"{text}{number}"}

    rows = [
        {
            "chosen": [*conversation(i), answer(i, "joy")],
            "rejected": [*conversation(i), answer(i, "bore")],
            "split": "test" if i == 0 else "train",
        }
        for i in range(6)
    ]
    result, tables = check(tmp_path, rows, tokenizer=tiny_model_dir)
    assert result.errors == []
    assert [read_turns(turns) for turns in tables["train"]["turns"]] == [conversation(i) for i in range(1, 6)]
    assert [read_turns(turns) for turns in tables["eval"]["turns"]] == [conversation(0)]
    assert pq.read_schema(tmp_path / "train.parquet").equals(PAIRS_SCHEMA)
    assert check(tmp_path / "plain", ROWS)[1]["train"]["turns"].isna().all()


def test_a_row_that_the_chat_template_refuses_is_quarantined(tmp_path):
    tokenizer = chat_tokenizer()
    refusal = "{% if messages[0]['content'] == 'No.' %}{{ raise_exception('no system turns') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "strict")
    _, tables = check(tmp_path, [*ROWS, row(100, prompt="No.")], tokenizer=tmp_path / "strict")
    (refused,) = tables["quarantine"].to_dict("records")
    assert (refused["rule"], refused["line"]) == ("template_refuses", 13)
    assert "no system turns" in refused["reason"]
