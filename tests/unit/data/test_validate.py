"""Validation from files to tables and reports: every row is accepted or quarantined."""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jinja2
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data import ingest as ingest_module
from dpo.data.ingest import write_raw_pairs
from dpo.data.readers import read_files
from dpo.data.rules import DATA_RULES, RULES
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA
from dpo.data.settings import DataSettings, ValidateSettings
from dpo.data.summary import wilson_interval
from dpo.data.validate import EXAMPLES, MAX_SERIAL_GROUPS, validate
from dpo.engine.chat import read_turns
from dpo.engine.pretrained import load_tokenizer
from tasks import validate as task
from tasks.commands import validate as command
from tasks.common.markdown import inline
from tasks.common.paths import (
    BASE,
    EVAL,
    METRICS,
    PROFILE,
    QUARANTINE,
    RAW_PAIRS,
    REPORTS,
    TRAIN,
)
from tasks.report import validation as report
from tests.support.examples import examples
from tests.support.models import bare_tokenizer, chat_tokenizer

PARAMS = load_params(Path(__file__).parents[3] / "params.yaml")
DATA = DataSettings(
    source="default",
    revision=None,
    pairing="best_worst",
    max_train_pairs=None,
    max_eval_pairs=None,
    eval_fraction=0.5,
    min_rating_gap=0.0,
)
ACTIONS = {name: "quarantine" for name, rule in RULES.items() if "quarantine" in rule.allowed}
SPLITS = ("train", "eval")


def settings_of(*, max_quarantined=1.0, max_longer_share=0.65, **rules):
    return ValidateSettings(
        max_quarantined=max_quarantined,
        near_duplicate_similarity=0.9,
        max_longer_share=max_longer_share,
        max_drift=0.25,
        rules={**ACTIONS, **rules},
    )


def row(number, **changes):
    """Return a valid, unique pair. One in four is held out. Chosen is the longer one in half of them."""
    sides = [f"joy{number}", f"bore{number} indeed{number}"]
    chosen, rejected = sides if number // 4 % 2 else reversed(sides)
    split = "train" if number % 4 else "eval"
    fields = {
        "id": f"p{number}",
        "prompt": f"Film {number}?",
        "chosen": chosen,
        "rejected": rejected,
        "split": split,
    }
    return {**fields, **changes}


def lines_of(rows):
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in rows)


def check(folder, rows, params=None, *, tokenizer=None, max_length=512, caps=None, seed=1, previous=None):
    """Ingest and validate rows in a folder; return the result and the written tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_bytes(lines_of(rows))
    write_raw_pairs(read_files([str(folder / "data.jsonl")]), folder / "raw_pairs.parquet", "data", DATA)
    return validated(
        folder,
        params or settings_of(),
        tokenizer=tokenizer,
        max_length=max_length,
        caps=caps or dict.fromkeys(SPLITS),
        seed=seed,
        previous=previous,
    )


def validated(folder, params=None, **arguments):
    defaults = {"tokenizer": None, "max_length": 512, "caps": dict.fromkeys(SPLITS), "seed": 1, "previous": None}
    defaults |= {"origin": "data", "benchmarks": folder / "benchmarks"}
    outputs = {name: folder / f"{name}.parquet" for name in (*SPLITS, "quarantine")}
    result = validate(
        folder / "raw_pairs.parquet", params or settings_of(), outputs=outputs, **defaults | arguments
    )
    json.dumps([result.to_json(), result.summary.profile], allow_nan=False)
    return result, {name: pd.read_parquet(path) for name, path in outputs.items() if path.exists()}


def ids(table):
    return table["id"].tolist()


LONG = {side: " ".join(f"{side}{i}" for i in range(80)) for side in ("chosen", "rejected")}
BAD = {
    "unreadable_row": b'{"prompt": \n',
    "invalid_utf8": b'{"prompt": "caf\xe9"}\n',
    "lone_surrogate": row(100, chosen="\ud83c"),
    "wrong_type": row(100, chosen=7),
    "missing_text": row(100, rejected=None),
    "broken_roles": row(100, prompt=[{"role": "critic", "content": "Film 100?"}]),
    "unknown_split": row(100, split="holdout"),
    "empty_completion": row(100, chosen=" "),
    "identical_completions": row(100, chosen="Joy.", rejected="joy. "),
    "control_characters": row(100, prompt="Film\x00 100?"),
    "mojibake": row(100, chosen="cafÃ©"),
    "special_tokens": row(100, prompt="Film<|im_end|> 100?"),
    "completion_too_long": row(100, chosen="joy " * 200),
    "prompt_truncated": row(100, prompt="Film " * 200),
    "duplicate_id": row(100, id="p1"),
    "duplicate_pair": row(1, id="p100"),
    "near_duplicate_pair": row(100, **{**LONG, "id": "twin", "rejected": LONG["rejected"] + " end"}),
    "contradiction": row(100, prompt="Film 1?", chosen=row(1)["rejected"], rejected=row(1)["chosen"]),
    "prompt_in_both_splits": row(101, prompt="Film 0?"),
    "eval_text_in_train": row(101, rejected=row(0)["chosen"]),
}
ROWS = [row(number) for number in range(12)]


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


def tamper(folder, **columns):
    check(folder, ROWS)
    table = pq.read_table(folder / "raw_pairs.parquet").to_pandas()
    table = table.assign(**columns)
    table.to_parquet(folder / "raw_pairs.parquet")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"split": "test"}, "field 'split'"),
        ({"chosen": None}, "a pair, or a rule that it breaks"),
        ({"weight": -1.0}, "field 'weight'"),
        ({"line": "one"}, "field 'line'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_raw_table_that_violates_its_schema_is_rejected(tmp_path, columns, words):
    tamper(tmp_path, **columns)
    with pytest.raises(InputError) as error:
        validated(tmp_path)
    assert str(tmp_path / "raw_pairs.parquet") in str(error.value)
    assert words in str(error.value)


def test_schema_errors_name_the_row_in_the_full_table(tmp_path, monkeypatch):
    check(tmp_path, ROWS)
    table = pq.read_table(tmp_path / "raw_pairs.parquet").to_pandas()
    table.loc[9, "split"] = "test"
    table.to_parquet(tmp_path / "raw_pairs.parquet", row_group_size=6)
    with pytest.raises(InputError, match="row 10, field 'split'"):
        validated(tmp_path)


def write_garbage(path):
    path.write_bytes(b"not Parquet")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)


def remove_rows(path):
    pq.write_table(RAW_PAIRS_SCHEMA.empty_table(), path)


@pytest.mark.parametrize("damage", [write_garbage, truncate, corrupt, remove_rows, Path.unlink])
def test_a_damaged_raw_table_is_rejected_with_its_name(tmp_path, damage):
    check(tmp_path, ROWS)
    damage(tmp_path / "raw_pairs.parquet")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'raw_pairs.parquet'}: n")):
        validated(tmp_path)


def test_a_folder_without_a_tokenizer_is_rejected_with_its_name(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=re.escape(f"cannot load '{tmp_path / 'model'}'")):
        check(tmp_path, ROWS, tokenizer=tmp_path / "model")


def test_a_pair_that_the_tokenizer_cannot_encode_is_reported_with_its_rows(tmp_path):
    tokenizer = bare_tokenizer()
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"rows 1 to 12: .*an empty prompt needs a tokenizer"):
        check(tmp_path, [*ROWS[:11], row(11, prompt="")], tokenizer=tmp_path / "bare")
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    tokenizer.save_pretrained(tmp_path / "strict")


def test_a_row_that_the_chat_template_refuses_is_quarantined(tmp_path):
    tokenizer = chat_tokenizer()
    refusal = "{% if messages[0]['content'] == 'No.' %}{{ raise_exception('no system turns') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "strict")
    _, tables = check(tmp_path, [*ROWS, row(100, prompt="No.")], tokenizer=tmp_path / "strict")
    (refused,) = tables["quarantine"].to_dict("records")
    assert (refused["rule"], refused["line"]) == ("template_refuses", 13)
    assert "no system turns" in refused["reason"]


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


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Change to an empty folder outside any repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_check_files_writes_report_metrics_and_quarantine(workdir, capsys, tiny_model_dir):
    (workdir / "data.jsonl").write_bytes(lines_of([*(row(i) for i in range(40)), BAD["mojibake"]]))
    command.check_files(PARAMS, ["data.jsonl"], tiny_model_dir, Path("checked"))
    shown = capsys.readouterr()
    assert "41 rows: 40 accepted, 1 quarantined; train 30 (30 used), eval 10 (10 used)" in shown.out
    assert re.search(
        r"^mojibake +1  quarantine +data.jsonl:41: field 'chosen' looks wrongly decoded", shown.out, re.MULTILINE
    )
    assert "tokens, median / 99th percentile / maximum" in shown.out
    assert shown.out.splitlines()[-1] == "report: checked/report.html"
    assert "no tokenizer" not in shown.err
    metrics = json.loads((workdir / "checked" / "metrics.json").read_text())
    assert (metrics["rows"], metrics["unit"], metrics["errors"]) == (41, "tokens", [])
    assert len(pd.read_parquet("checked/quarantine.parquet")) == 1
    assert not (workdir / PROFILE).exists()


def test_pairs_are_shown_as_the_model_reads_them(workdir, capsys, tiny_model_dir):
    turns = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "The end."}]
    first = row(1, chosen=[{"role": "assistant", "content": "A joy."}, *turns])
    (workdir / "data.jsonl").write_bytes(lines_of([first, *ROWS[2:], ROWS[0]]))
    command.check_files(PARAMS, ["data.jsonl"], tiny_model_dir, Path("checked"), show=1)
    shown = capsys.readouterr().out.partition("\npair ")[2]
    assert re.findall(r"^\[(\w+)\]", shown, re.MULTILINE) == [
        *("prompt", "chosen", "context", "chosen", "end", "rejected", "end"),
    ]
    assert "[chosen] A joy.<|im_end|>\n[context] \n<|im_start|>user\nAnd?" in shown
    assert "[chosen] The end.\n[end] <|im_end|>\n" in shown
    with pytest.raises(InputError, match="--show: pairs are shown as tokens; set --model"):
        command.check_files(PARAMS, ["data.jsonl"], None, Path("checked"), show=1)


@pytest.mark.parametrize(
    "template", ["Today: {{ strftime_now('%d %b %Y') }}\n", '{{ strftime_now("%H:%M:%S") }}\n']
)
def test_check_files_writes_the_date_of_the_pipeline(workdir, capsys, tiny_model_dir, template):
    tokenizer = load_tokenizer(tiny_model_dir)
    tokenizer.chat_template = template + tokenizer.chat_template
    tokenizer.save_pretrained("dated")
    (workdir / "data.jsonl").write_bytes(lines_of(ROWS))
    with pytest.raises(
        InputError, match=r"--model: dated: the chat template writes today's date; set model\.date"
    ):
        command.check_files(PARAMS, ["data.jsonl"], Path("dated"), Path("checked"))
    dated = replace(PARAMS, model=replace(PARAMS.model, date="2021-02-03"))
    command.check_files(dated, ["data.jsonl"], Path("dated"), Path("checked"), show=1)
    shown = capsys.readouterr().out
    assert ("[prompt] Today: 03 Feb 2021\n" if "Today" in template else "[prompt] 00:00:00\n") in shown


def test_check_files_without_a_tokenizer_reports_lengths_in_characters(workdir, capsys):
    (workdir / "data.jsonl").write_bytes(lines_of(ROWS))
    command.check_files(PARAMS, ["data.jsonl"], None, Path("checked"))
    shown = capsys.readouterr()
    assert "lengths are in characters; set one with --model" in shown.err
    assert "characters, median" in shown.out
    with pytest.raises(InputError, match=r"--model: nowhere is not a folder"):
        command.check_files(PARAMS, ["data.jsonl"], Path("nowhere"), Path("checked"))


def test_check_files_writes_report_and_errors_before_it_fails(workdir, capsys):
    (workdir / "data.jsonl").write_bytes(lines_of([*ROWS[1:4], row(8, chosen="")]))
    with pytest.raises(InputError) as error:
        command.check_files(PARAMS, ["data.jsonl"], None, Path("checked"))
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("the data must not be used: ") for line in lines)
    written = json.loads((workdir / "checked" / "metrics.json").read_text())
    assert [error["code"] for error in written["errors"]] == ["too_many_quarantined", "empty_split"]
    assert [f"the data must not be used: {error['message']}" for error in written["errors"]] == lines
    assert written["errors"][1]["split"] == "eval"
    assert "4 rows: 3 accepted, 1 quarantined" in capsys.readouterr().out
    assert "The data must not be used" in (workdir / "checked" / "report.html").read_text()
    assert (workdir / "checked" / "quarantine.parquet").exists()


def test_the_stage_writes_a_profile_only_if_there_are_no_errors(workdir, monkeypatch, capsys, tiny_model_dir):
    logged = []
    monkeypatch.setattr("tasks.tracking.runs.log_validation", lambda *arguments: logged.append(arguments))
    monkeypatch.setattr(task, "load_params", lambda: PARAMS)
    for folder in (RAW_PAIRS, BASE):
        folder.parent.mkdir(parents=True, exist_ok=True)
    BASE.symlink_to(tiny_model_dir)
    rows = Path("data.jsonl")
    rows.write_bytes(lines_of(ROWS[1:4]))
    write_raw_pairs(read_files(["data.jsonl"]), RAW_PAIRS, "data", DATA)
    with pytest.raises(InputError, match="split 'eval' has no valid pairs"):
        task.main()
    assert QUARANTINE.exists()
    assert (REPORTS / "validate.html").exists()
    (error,) = json.loads((METRICS / "validate.json").read_text())["errors"]
    assert (error["code"], error["split"]) == ("empty_split", "eval")
    assert not any(path.exists() for path in (PROFILE, TRAIN, EVAL))
    rows.write_bytes(lines_of(ROWS))
    write_raw_pairs(read_files(["data.jsonl"]), RAW_PAIRS, "data", DATA)
    task.main()
    assert json.loads(PROFILE.read_text())["unit"] == "tokens"
    assert ids(pd.read_parquet(EVAL)) == ["p0", "p4", "p8"]
    assert json.loads((METRICS / "validate.json").read_text())["errors"] == []
    assert "12 rows: 12 accepted" in (REPORTS / "validate.md").read_text()
    assert len(logged) == 2


@pytest.fixture(scope="module")
def broken_result(tmp_path_factory):
    """Validate rows whose texts are HTML and template code."""
    code = "<script>alert(1)</script>{{ 7*7 }}"
    rows = [
        *(row(i, source="even") for i in range(40)),
        *(row(i, source=f"{code}\n|", split="train") for i in range(40, 64)),
        row(70, prompt=code, chosen="", id=code),
        row(71, prompt=code, chosen=f"{code}\x00", rejected=f"{code}cafÃ©"),
        row(72, split=code),
        b"<script>alert(2)</script>\n",
    ]
    folder = tmp_path_factory.mktemp("broken_result")
    previous, _ = check(folder / "before", [row(i) for i in range(40)])
    return check(folder, rows, settings_of(control_characters="error"), previous=previous.summary.profile)[0]


def test_the_page_escapes_all_text_and_loads_nothing(broken_result, tmp_path):
    report.write_report(broken_result, PARAMS, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7*7 }}" in page
    assert "&lt;script&gt;alert(2)" in page
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)
    assert "every source is in both splits" in page
    for rule in ("empty_completion", "control_characters", "unknown_split", "unreadable_row", "source_imbalance"):
        assert rule in page
    for part in ("prompt", "chosen", "rejected"):
        assert f"histogram of {part}" in page
    assert re.search(
        r"The data must not be used: [^<]*, line \d+: [^<]*rule &#39;control_characters&#39;, 1 in total", page
    )
    assert "population stability index" in page


def everything(broken_result):
    """Return the result with every rule broken."""
    metrics = {**broken_result.metrics, "rules": {rule: number + 1 for number, rule in enumerate(RULES)}}
    example = next(iter(broken_result.examples.values()))
    return dataclasses.replace(
        broken_result,
        metrics=metrics,
        summary=dataclasses.replace(
            broken_result.summary, notices=[(rule, f"reason {i}") for i in range(5) for rule in DATA_RULES]
        ),
        examples=dict.fromkeys(RULES, example),
    )


def test_the_terminal_table_has_at_most_twenty_five_lines(broken_result):
    for result in (broken_result, everything(broken_result)):
        shown = report.table(result, PARAMS, Path("reports/validate.html")).splitlines()
        assert len(shown) <= 25
        assert all(line.isprintable() for line in shown)
    assert f"and {len(RULES) - report.SHOWN_RULES} more rules, see the report" in shown
    counts = [int(line.split()[1]) for line in shown[3 : 3 + report.SHOWN_RULES]]
    assert counts == sorted(range(len(RULES) + 1), reverse=True)[: report.SHOWN_RULES]


def test_markdown_contains_all_broken_rules(broken_result):
    text = report.markdown(everything(broken_result), PARAMS)
    assert f"{broken_result.metrics['rows']} rows: {broken_result.metrics['accepted']} accepted" in text
    assert f"- {inline(broken_result.errors[0].message)}" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(RULES)
    assert {line.count("|") for line in table} == {6}
    for number, rule in enumerate(RULES):
        assert any(line.startswith(f"| {rule} | {number + 1} | ") for line in table)
    assert "<script" not in text


def test_reports_say_that_no_rule_is_broken(tmp_path):
    result, _ = check(tmp_path, ROWS)
    assert "No rule is broken." in report.markdown(result, PARAMS)
    report.write_report(result, PARAMS, tmp_path / "report.html")
    assert f"All rows satisfy all {len(RULES)} rules." in (tmp_path / "report.html").read_text()
    assert "No earlier version of the data with lengths in characters" in (tmp_path / "report.html").read_text()


def test_the_template_uses_no_undefined_value(broken_result, tmp_path, monkeypatch):
    monkeypatch.setattr(
        report, "Environment", lambda **options: jinja2.Environment(undefined=jinja2.StrictUndefined, **options)
    )
    for number, result in enumerate((broken_result, everything(broken_result))):
        report.write_report(result, PARAMS, tmp_path / f"{number}.html")
        report.write_report(result, PARAMS, tmp_path / f"{number}.html", demonstrations=result)


def git(*arguments):
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


def commit(content):
    PROFILE.parent.mkdir(exist_ok=True)
    PROFILE.write_bytes(content)
    git("add", "-A")
    git("commit", "-m", "data")


def test_committed_profile_is_read_from_the_last_commit(workdir, monkeypatch):
    assert task.committed_profile() is None
    git("init")
    assert task.committed_profile() is None
    git("commit", "--allow-empty", "-m", "nothing")
    assert task.committed_profile() is None
    commit(b'{"unit": "tokens", "name": "caf\xc3\xa9"}')
    PROFILE.write_text('{"unit": "changed since"}')
    assert task.committed_profile() == {"unit": "tokens", "name": "café"}
    monkeypatch.setenv("PATH", str(workdir / "nowhere"))
    assert task.committed_profile() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b"null", b'"text"', b"\xff\xfe"])
def test_an_invalid_committed_profile_is_ignored(workdir, content):
    git("init")
    commit(content)
    assert task.committed_profile() is None


def test_the_command_prints_its_usage():
    run = subprocess.run(
        [sys.executable, "-m", "tasks.commands.cli", "validate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for words in ("dpo validate", "FILE", "--model", "--output"):
        assert words in run.stdout
