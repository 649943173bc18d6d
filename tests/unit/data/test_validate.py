"""Validation from files to tables: every row goes on or is set aside, and the reports say so."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data import ingest as ingest_module
from dpo.data.ingest import collect
from dpo.data.readers import read_files
from dpo.data.rules import DATA_RULES, RULES
from dpo.data.schema import PAIRS_SCHEMA, RAW_PAIRS_SCHEMA
from dpo.data.settings import DataSettings, RuleSettings, ValidateSettings
from dpo.data.validate import EXAMPLES, GROUPS_ALONE, validate
from tasks import validate as task
from tasks.commands import validate as command
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
from tests.support.models import bare_tokenizer

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
SETTINGS = {field.name: "quarantine" for field in dataclasses.fields(RuleSettings)} | dict.fromkeys(
    DATA_RULES, "warn"
)
SPLITS = ("train", "eval")


def contract(*, max_quarantined=1.0, max_longer_share=0.65, **rules):
    return ValidateSettings(
        max_quarantined=max_quarantined,
        near_duplicate_similarity=0.9,
        max_longer_share=max_longer_share,
        max_drift=0.25,
        rules=RuleSettings(**{**SETTINGS, **rules}),
    )


def row(number, **changes):
    """A sound pair unlike all others; one in four is held out, chosen is the longer one in half of them."""
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
    """Collect and validate rows in a folder; the verdict, and the tables that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_bytes(lines_of(rows))
    collect(read_files([str(folder / "data.jsonl")]), folder / "candidates.parquet", "data", DATA)
    return validated(
        folder,
        params or contract(),
        tokenizer=tokenizer,
        max_length=max_length,
        caps=caps or dict.fromkeys(SPLITS),
        seed=seed,
        previous=previous,
    )


def validated(folder, params=None, **arguments):
    defaults = {"tokenizer": None, "max_length": 512, "caps": dict.fromkeys(SPLITS), "seed": 1, "previous": None}
    outputs = {name: folder / f"{name}.parquet" for name in (*SPLITS, "quarantine")}
    result = validate(folder / "candidates.parquet", params or contract(), outputs=outputs, **defaults | arguments)
    json.dumps([result.metrics, result.profile], allow_nan=False)
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
def test_a_row_that_breaks_a_rule_is_set_aside_as_it_stood(tmp_path, tiny_model_dir, rule):
    rows = [*ROWS, BAD[rule]]
    result, tables = check(tmp_path, rows, tokenizer=tiny_model_dir, max_length=150)
    (tmp,) = tables["quarantine"].to_dict("records")
    assert tmp["rule"] == rule
    assert tmp["reason"]
    assert tmp["file"] == str(tmp_path / "data.jsonl")
    assert tmp["line"] == 13
    assert tmp["original"] == lines_of(rows).splitlines()[-1].strip().decode(errors="backslashreplace")
    assert {**result.metrics["rules"], rule: 0} == dict.fromkeys(RULES, 0)
    assert result.metrics["rules"][rule] == 1
    assert (result.metrics["rows"], result.metrics["accepted"], result.metrics["quarantined"]) == (13, 12, 1)
    (example,) = result.examples[rule]
    assert (example["line"], example["rule"], example["reason"]) == (13, rule, tmp["reason"])
    if rule == "completion_too_long":
        assert "completion_too_long" in result.errors[0]
        assert set(tables) == {"quarantine"}
    else:
        assert result.errors == []
        assert ids(tables["train"]) == [r["id"] for r in ROWS if r["split"] == "train"]
        assert ids(tables["eval"]) == [r["id"] for r in ROWS if r["split"] == "eval"]


def test_of_a_contradiction_both_rows_are_set_aside_and_of_near_repeats_the_second(tmp_path):
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
def test_a_warning_counts_the_row_and_lets_it_through(tmp_path, tiny_model_dir, rule):
    params = contract(**{rule: "warn"})
    result, tables = check(tmp_path, [*ROWS, BAD[rule]], params, tokenizer=tiny_model_dir, max_length=150)
    assert result.errors == []
    assert result.metrics["rules"][rule] == 1
    assert result.metrics["quarantined"] == len(tables["quarantine"]) == 0
    kept = pd.concat([tables["train"], tables["eval"]]).set_index("id").loc[BAD[rule]["id"]]
    assert kept["prompt"] == BAD[rule]["prompt"]
    assert result.examples[rule][0]["id"] == BAD[rule]["id"]


@pytest.mark.parametrize("rule", ["wrong_type", "mojibake", "duplicate_id"])
def test_an_error_stops_before_anything_is_trained(tmp_path, rule):
    result, tables = check(tmp_path, [*ROWS, BAD[rule]], contract(**{rule: "error"}))
    (error,) = result.errors
    place, _, rest = error.partition(", line 13: ")
    assert place.endswith("data.jsonl")
    assert rest.endswith(f"; {RULES[rule].mend} (rule '{rule}', 1 in all)")
    assert set(tables) == {"quarantine"}
    assert tables["quarantine"]["rule"].tolist() == [rule]


def test_an_error_takes_no_table_of_an_earlier_run_for_its_own(tmp_path):
    check(tmp_path, ROWS)
    before = (tmp_path / "train.parquet").read_bytes()
    check(tmp_path, [*ROWS, BAD["mojibake"]], contract(mojibake="error"))
    assert (tmp_path / "train.parquet").read_bytes() == before


@pytest.mark.parametrize(("most", "stops"), [(0.25, False), (0.249, True), (0, True), (1, False)])
def test_too_large_a_share_set_aside_is_an_error(tmp_path, most, stops):
    rows = [*ROWS[:9], *(row(i, chosen="") for i in range(20, 23))]
    result, tables = check(tmp_path, rows, contract(max_quarantined=most))
    assert bool(result.errors) == stops == ("train" not in tables)
    assert all("validate.max_quarantined" in error for error in result.errors)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_a_sound_pair_is_an_error(tmp_path, split):
    rows = [r for r in ROWS if r["split"] != split] + [row(50, split=split, chosen="")]
    result, tables = check(tmp_path, rows)
    assert [f"split '{split}'" in error for error in result.errors] == [True]
    assert set(tables) == {"quarantine"}


def test_without_any_sound_pair_there_is_a_verdict_nonetheless(tmp_path):
    result, tables = check(tmp_path, [row(i, chosen="") for i in range(7)])
    assert len(result.errors) == 2
    assert result.profile == {}
    assert result.metrics["accepted"] == 0
    assert len(tables["quarantine"]) == 7
    assert len(result.examples["empty_completion"]) == EXAMPLES
    assert "7 set aside" in report.table(result, PARAMS, tmp_path)
    report.write_report(result, PARAMS, tmp_path / "report.html")


def test_every_row_of_the_source_is_in_one_table(tmp_path):
    rows = [*ROWS, *BAD.values(), row(100, **LONG, id="late")]
    result, tables = check(tmp_path, rows)
    stood = pd.read_parquet(tmp_path / "candidates.parquet")
    assert result.metrics["rows"] == len(stood) == len(rows)
    assert sum(map(len, tables.values())) == len(rows)
    kept = stood[~stood["line"].isin(tables["quarantine"]["line"])]
    assert sorted(ids(kept)) == sorted([*ids(tables["train"]), *ids(tables["eval"])])
    for name in SPLITS:
        assert pq.read_schema(tmp_path / f"{name}.parquet").names == PAIRS_SCHEMA.names
        assert set(tables[name]["split"]) == {name}
        assert result.metrics[name]["pairs"] == result.metrics[name]["used"] == len(tables[name])
    assert pq.read_schema(tmp_path / "quarantine.parquet").names == RAW_PAIRS_SCHEMA.names
    assert tables["quarantine"][["rule", "reason", "original"]].notna().all(axis=None)


def test_caps_draw_that_many_pairs_by_the_seed(tmp_path):
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
def test_a_side_that_is_the_longer_one_too_often_is_told(tmp_path, side):
    rows = [longer(i, side) for i in range(40)]
    result, _ = check(tmp_path, rows)
    ((rule, reason),) = result.notices
    assert rule == "length_bias"
    assert reason.startswith(f"{side} is the longer one in 100% of pairs")
    assert result.metrics["rules"]["length_bias"] == 1
    assert result.metrics["chosen_longer"]["share"] == (side == "chosen")
    assert result.errors == []
    result, tables = check(tmp_path / "error", rows, contract(length_bias="error"))
    assert "length_bias" in result.errors[0]
    assert set(tables) == {"quarantine"}


def test_balanced_lengths_are_not_told(tmp_path):
    result, _ = check(tmp_path, [row(i) for i in range(40)])
    assert result.notices == []
    assert result.metrics["chosen_longer"]["share"] == 0.5
    assert 0.3 < result.metrics["chosen_longer"]["low"] < 0.5 < result.metrics["chosen_longer"]["high"] < 0.7


def test_pairs_of_equal_length_have_no_longer_side(tmp_path):
    result, _ = check(tmp_path, [row(i, chosen=f"aaa{i}", rejected=f"bbb{i}") for i in range(40)])
    assert result.metrics["chosen_longer"] is None
    assert result.metrics["sources"]["data.jsonl"]["chosen_longer"] is None
    assert result.notices == []
    report.write_report(result, PARAMS, tmp_path / "report.html")


def test_a_source_out_of_balance_is_told(tmp_path):
    rows = [
        *(row(i, source="even") for i in range(160)),
        *(row(i, source="one split", split="train") for i in range(200, 224)),
        *(longer(i, "chosen", source="biased") for i in range(300, 324)),
        *(longer(i, "chosen", source="few", split="train") for i in range(400, 410)),
    ]
    result, _ = check(tmp_path, rows)
    assert {rule for rule, _ in result.notices} == {"source_imbalance"}
    reasons = [reason for _, reason in result.notices]
    assert len(reasons) == result.metrics["rules"]["source_imbalance"] == 2
    assert "source 'one split': all of its 24 pairs are in one split" in reasons
    assert any(reason.startswith("source 'biased': chosen is the longer one in 100%") for reason in reasons)
    assert result.metrics["sources"]["even"] == {"pairs": 160, "eval": 40, "chosen_longer": 0.5}


def test_a_lone_source_is_not_held_against_others(tmp_path):
    result, _ = check(tmp_path, [row(i, source="only", split="train") for i in range(30)])
    assert result.notices == []


def test_drift_against_an_earlier_version_is_told(tmp_path):
    old = [
        row(i, prompt=f"{('Film', 'Book', 'Song', 'Play')[i % 4]} {i % 4 + 1}, in {i} words") for i in range(80)
    ]
    before, _ = check(tmp_path / "before", old)
    assert "drift" not in before.metrics
    same, _ = check(tmp_path / "same", old, previous=before.profile)
    assert same.metrics["drift"] == pytest.approx(dict.fromkeys(same.metrics["drift"], 0), abs=1e-9)
    assert same.notices == []
    rows = [row(i, prompt=f"Write about soup number {i} please", source="new") for i in range(80)]
    other, _ = check(tmp_path / "other", rows, previous=before.profile)
    told = [reason.split(":")[0] for rule, reason in other.notices if rule == "drift"]
    assert {"prompt_tokens", "sources", "prompts"} <= set(told)
    assert other.metrics["rules"]["drift"] == len(told)
    assert other.errors == []
    error, _ = check(tmp_path / "error", rows, contract(drift="error"), previous=before.profile)
    assert f"rule 'drift', {len(told)} in all" in error.errors[0]


def test_lengths_in_other_units_are_not_compared(tmp_path, tiny_model_dir):
    before, _ = check(tmp_path / "before", ROWS)
    after, _ = check(tmp_path / "after", ROWS, tokenizer=tiny_model_dir, previous=before.profile)
    assert (before.metrics["unit"], after.metrics["unit"]) == ("characters", "tokens")
    assert "drift" not in after.metrics
    foreign, _ = check(tmp_path / "after", ROWS, previous={"something": "else"})
    assert "drift" not in foreign.metrics


def test_without_a_tokenizer_lengths_are_characters(tmp_path):
    result, _ = check(tmp_path, [row(i, prompt=f"{i:05}", chosen=f"é🎬{i:03}") for i in range(8)], max_length=3)
    assert result.metrics["lengths"]["prompt"] == {"median": 5, "p90": 5, "p99": 5, "max": 5}
    assert result.metrics["lengths"]["chosen"]["max"] == 5
    assert result.errors == []


def test_the_human_ceiling_is_the_mean_agreement_of_the_pairs_in_use(tmp_path):
    rows = [row(i, **({"agreement": 0.6 + i / 100} if i % 4 and i < 8 else {})) for i in range(12)]
    result, tables = check(tmp_path, rows)
    known = [0.6 + i / 100 for i in (1, 2, 3, 5, 6, 7)]
    assert result.metrics["train"]["human_ceiling"] == pytest.approx(sum(known) / 6)
    assert result.metrics["eval"]["human_ceiling"] is None
    result, tables = check(tmp_path, rows, caps={"train": 4, "eval": 1})
    assert result.metrics["train"]["human_ceiling"] == pytest.approx(tables["train"]["agreement"].mean())


def same(one, other):
    (result, tables), (again, others) = one, other
    assert dataclasses.asdict(result) == dataclasses.asdict(again)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, others[name])


MANY = [
    *ROWS,
    *(row(i) for i in range(20, 60)),
    *(bad for rule, bad in BAD.items() if rule != "completion_too_long"),
]


def test_two_row_groups_give_what_one_gives(tmp_path, monkeypatch, tiny_model_dir):
    whole = check(tmp_path, MANY, tokenizer=tiny_model_dir, caps={"train": 20, "eval": None})
    monkeypatch.setattr(ingest_module, "GROUP_ROWS", len(MANY) // 2 + 1)
    parts = check(tmp_path, MANY, tokenizer=tiny_model_dir, caps={"train": 20, "eval": None})
    assert pq.ParquetFile(tmp_path / "candidates.parquet").num_row_groups == 2
    same(whole, parts)


def test_many_row_groups_in_several_processes_give_what_one_gives(tmp_path, monkeypatch, tiny_model_dir):
    whole = check(tmp_path, MANY, tokenizer=tiny_model_dir)
    monkeypatch.setattr(ingest_module, "GROUP_ROWS", 5)
    parts = check(tmp_path, MANY, tokenizer=tiny_model_dir)
    assert pq.ParquetFile(tmp_path / "candidates.parquet").num_row_groups > GROUPS_ALONE
    same(whole, parts)


def test_conversations_come_through_with_their_turns(tmp_path, tiny_model_dir):
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
    assert [list(turns) for turns in tables["train"]["turns"]] == [conversation(i) for i in range(1, 6)]
    assert [list(turns) for turns in tables["eval"]["turns"]] == [conversation(0)]
    assert pq.read_schema(tmp_path / "train.parquet").equals(PAIRS_SCHEMA)
    assert check(tmp_path / "plain", ROWS)[1]["train"]["turns"].isna().all()


def tamper(folder, **columns):
    check(folder, ROWS)
    table = pq.read_table(folder / "candidates.parquet").to_pandas()
    table = table.assign(**columns)
    table.to_parquet(folder / "candidates.parquet")


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
def test_a_candidate_table_that_breaks_its_contract_is_refused(tmp_path, columns, words):
    tamper(tmp_path, **columns)
    with pytest.raises(InputError) as error:
        validated(tmp_path)
    assert str(tmp_path / "candidates.parquet") in str(error.value)
    assert words in str(error.value)


def test_the_row_that_breaks_the_contract_is_named_by_its_place_in_the_whole_table(tmp_path, monkeypatch):
    check(tmp_path, ROWS)
    table = pq.read_table(tmp_path / "candidates.parquet").to_pandas()
    table.loc[9, "split"] = "test"
    table.to_parquet(tmp_path / "candidates.parquet", row_group_size=6)
    with pytest.raises(InputError, match="row 10, field 'split'"):
        validated(tmp_path)


def garbage(path):
    path.write_bytes(b"no Parquet at all")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoiled(path):
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)


def no_rows(path):
    pq.write_table(RAW_PAIRS_SCHEMA.empty_table(), path)


@pytest.mark.parametrize("harm", [garbage, cut, spoiled, no_rows, Path.unlink])
def test_what_is_no_candidate_table_is_refused_by_name(tmp_path, harm):
    check(tmp_path, ROWS)
    harm(tmp_path / "candidates.parquet")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'candidates.parquet'}: n")):
        validated(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=re.escape(f"cannot load '{tmp_path / 'model'}'")):
        check(tmp_path, ROWS, tokenizer=tmp_path / "model")


def test_a_pair_that_the_tokenizer_cannot_take_is_refused_with_its_words(tmp_path):
    tokenizer = bare_tokenizer()
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"rows 1 to 12: .*an empty prompt needs a tokenizer"):
        check(tmp_path, [*ROWS[:11], row(11, prompt="")], tokenizer=tmp_path / "bare")
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    tokenizer.save_pretrained(tmp_path / "strict")
    with pytest.raises(InputError, match="no system turns"):
        check(tmp_path, ROWS, tokenizer=tmp_path / "strict")


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


def account(folder, rows, tokenizer=None):
    """Every row is accounted for, or the input is refused."""
    content = [line for line in lines_of(rows).removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    try:
        result, tables = check(folder, rows, tokenizer=tokenizer)
    except InputError:
        return
    stood = pd.read_parquet(folder / "candidates.parquet")
    tmp = tables["quarantine"]
    metrics = result.metrics
    assert len(stood) == stood["line"].nunique() == metrics["rows"] == len(content)
    assert metrics["rows"] == metrics["accepted"] + metrics["quarantined"]
    assert tmp["line"].nunique() == len(tmp) == metrics["quarantined"]
    assert tmp[["rule", "reason", "file", "original"]].notna().all(axis=None)
    if not result.errors:
        kept = stood[~stood["line"].isin(tmp["line"])]
        assert sorted(ids(kept)) == sorted([*ids(tables["train"]), *ids(tables["eval"])])
        assert not set(tables["train"]["prompt"]) & set(tables["eval"]["prompt"])
    assert len(report.table(result, PARAMS, folder).splitlines()) <= 20
    report.markdown(result, PARAMS)
    report.write_report(result, PARAMS, folder / "report.html")


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ANY_ROW, min_size=1, max_size=12))
def test_however_broken_the_rows_are_each_is_accounted_for(tmp_path_factory, rows):
    account(tmp_path_factory.mktemp("any"), [*ROWS[:5], *rows])


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(ANY_ROW, min_size=1, max_size=4))
def test_files_of_broken_rows_alone_are_refused_or_accounted_for(tmp_path_factory, rows):
    account(tmp_path_factory.mktemp("any"), rows)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(SHAPED, min_size=1, max_size=8))
def test_with_a_tokenizer_each_row_is_accounted_for(tmp_path_factory, tiny_model_dir, rows):
    account(tmp_path_factory.mktemp("any"), [*ROWS[:5], *rows], tokenizer=tiny_model_dir)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working folder outside any repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_are_checked_on_their_own(alone, capsys, tiny_model_dir):
    (alone / "data.jsonl").write_bytes(lines_of([*(row(i) for i in range(40)), BAD["mojibake"]]))
    command.check_files(PARAMS, ["data.jsonl"], tiny_model_dir, Path("checked"))
    shown = capsys.readouterr()
    assert "41 rows: 40 sound, 1 set aside; train 30 (30 used), eval 10 (10 used)" in shown.out
    assert re.search(r"^mojibake +1  quarantine +data.jsonl:41$", shown.out, re.MULTILINE)
    assert "tokens, median / 99th percentile / most" in shown.out
    assert shown.out.splitlines()[-1] == "report: checked/report.html"
    assert "no tokenizer" not in shown.err
    metrics = json.loads((alone / "checked" / "metrics.json").read_text())
    assert (metrics["rows"], metrics["unit"]) == (41, "tokens")
    assert len(pd.read_parquet("checked/quarantine.parquet")) == 1
    assert not (alone / PROFILE).exists()


def test_without_a_model_the_check_says_that_lengths_are_characters(alone, capsys):
    (alone / "data.jsonl").write_bytes(lines_of(ROWS))
    command.check_files(PARAMS, ["data.jsonl"], None, Path("checked"))
    shown = capsys.readouterr()
    assert "lengths are in characters; name one with --model" in shown.err
    assert "characters, median" in shown.out
    with pytest.raises(InputError, match=r"--model: nowhere is not a folder"):
        command.check_files(PARAMS, ["data.jsonl"], Path("nowhere"), Path("checked"))


def test_data_that_must_not_be_used_ends_the_check_after_its_report(alone, capsys):
    (alone / "data.jsonl").write_bytes(lines_of([*ROWS[1:4], row(8, chosen="")]))
    with pytest.raises(InputError) as error:
        command.check_files(PARAMS, ["data.jsonl"], None, Path("checked"))
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("the data must not be used: ") for line in lines)
    assert "4 rows: 3 sound, 1 set aside" in capsys.readouterr().out
    assert "The data must not be used" in (alone / "checked" / "report.html").read_text()
    assert (alone / "checked" / "quarantine.parquet").exists()


def test_the_stage_writes_a_profile_only_if_the_data_may_be_used(alone, monkeypatch, capsys, tiny_model_dir):
    logged = []
    monkeypatch.setattr(task, "log_validation", lambda *arguments: logged.append(arguments))
    monkeypatch.setattr(task, "load_params", lambda: PARAMS)
    for folder in (RAW_PAIRS, BASE):
        folder.parent.mkdir(parents=True, exist_ok=True)
    BASE.symlink_to(tiny_model_dir)
    rows = Path("data.jsonl")
    rows.write_bytes(lines_of(ROWS[1:4]))
    collect(read_files(["data.jsonl"]), RAW_PAIRS, "data", DATA)
    with pytest.raises(InputError, match="no sound pair is in split 'eval'"):
        task.main()
    assert QUARANTINE.exists()
    assert (REPORTS / "validate.html").exists()
    assert (METRICS / "validate.json").exists()
    assert not any(path.exists() for path in (PROFILE, TRAIN, EVAL))
    rows.write_bytes(lines_of(ROWS))
    collect(read_files(["data.jsonl"]), RAW_PAIRS, "data", DATA)
    task.main()
    assert json.loads(PROFILE.read_text())["unit"] == "tokens"
    assert ids(pd.read_parquet(EVAL)) == ["p0", "p4", "p8"]
    assert "12 rows: 12 sound" in (REPORTS / "validate.md").read_text()
    assert len(logged) == 2


@pytest.fixture(scope="module")
def verdict(tmp_path_factory):
    """A verdict on rows whose every text would be code in a page."""
    code = "<script>alert(1)</script>{{ 7*7 }}"
    rows = [
        *(row(i, source="even") for i in range(40)),
        *(row(i, source=f"{code}\n|", split="train") for i in range(40, 64)),
        row(70, prompt=code, chosen="", id=code),
        row(71, prompt=code, chosen=f"{code}\x00", rejected=f"{code}cafÃ©"),
        row(72, split=code),
        b"<script>alert(2)</script>\n",
    ]
    folder = tmp_path_factory.mktemp("verdict")
    previous, _ = check(folder / "before", [row(i) for i in range(40)])
    return check(folder, rows, contract(control_characters="error"), previous=previous.profile)[0]


def test_the_page_escapes_every_text_and_opens_offline(verdict, tmp_path):
    report.write_report(verdict, PARAMS, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7*7 }}" in page
    assert "&lt;script&gt;alert(2)" in page
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)
    assert "Every source is in both splits" in page
    for rule in ("empty_completion", "control_characters", "unknown_split", "unreadable_row", "source_imbalance"):
        assert rule in page
    for part in ("prompt", "chosen", "rejected"):
        assert f"histogram of {part}" in page
    assert re.search(
        r"The data must not be used: [^<]*, line \d+: [^<]*rule &#39;control_characters&#39;, 1 in all", page
    )
    assert "population stability index" in page


def everything(verdict):
    """The verdict with every rule broken."""
    metrics = {**verdict.metrics, "rules": {rule: number + 1 for number, rule in enumerate(RULES)}}
    example = next(iter(verdict.examples.values()))
    return dataclasses.replace(
        verdict,
        metrics=metrics,
        notices=[(rule, f"reason {i}") for i in range(5) for rule in DATA_RULES],
        examples=dict.fromkeys(RULES, example),
    )


def test_a_terminal_shows_at_most_twenty_lines(verdict):
    for result in (verdict, everything(verdict)):
        shown = report.table(result, PARAMS, Path("reports/validate.html")).splitlines()
        assert len(shown) <= 20
        assert all(line.isprintable() for line in shown)
    assert f"and {len(RULES) - report.SHOWN_RULES} more rules, see the report" in shown
    counts = [int(line.split()[1]) for line in shown[2 : 2 + report.SHOWN_RULES]]
    assert counts == sorted(range(len(RULES) + 1), reverse=True)[: report.SHOWN_RULES]


def test_markdown_holds_the_counts_in_whole_tables(verdict):
    text = report.markdown(everything(verdict), PARAMS)
    assert f"{verdict.metrics['rows']} rows: {verdict.metrics['accepted']} sound" in text
    assert f"- **{verdict.errors[0]}**" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(RULES)
    assert {line.count("|") for line in table} == {6}
    for number, rule in enumerate(RULES):
        assert any(line.startswith(f"| {rule} | {number + 1} | ") for line in table)
    assert "<script" not in text


def test_nothing_broken_is_said_in_words(tmp_path):
    result, _ = check(tmp_path, ROWS)
    assert "No rule is broken." in report.markdown(result, PARAMS)
    report.write_report(result, PARAMS, tmp_path / "report.html")
    assert f"All {len(RULES)} rules are kept by all rows." in (tmp_path / "report.html").read_text()
    assert "No earlier version of the data, measured in characters," in (tmp_path / "report.html").read_text()


def test_the_template_names_no_missing_value(verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(
        report, "Environment", lambda **options: jinja2.Environment(undefined=jinja2.StrictUndefined, **options)
    )
    for number, result in enumerate((verdict, everything(verdict))):
        report.write_report(result, PARAMS, tmp_path / f"{number}.html")


def git(*arguments):
    who = ("-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


def commit(content):
    PROFILE.parent.mkdir(exist_ok=True)
    PROFILE.write_bytes(content)
    git("add", "-A")
    git("commit", "-m", "data")


def test_the_profile_is_that_of_the_last_commit(alone, monkeypatch):
    assert task.committed_profile() is None
    git("init")
    assert task.committed_profile() is None
    git("commit", "--allow-empty", "-m", "nothing")
    assert task.committed_profile() is None
    commit(b'{"unit": "tokens", "name": "caf\xc3\xa9"}')
    PROFILE.write_text('{"unit": "changed since"}')
    assert task.committed_profile() == {"unit": "tokens", "name": "café"}
    monkeypatch.setenv("PATH", str(alone / "nowhere"))
    assert task.committed_profile() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b"null", b'"text"', b"\xff\xfe"])
def test_what_is_no_profile_is_none(alone, content):
    git("init")
    commit(content)
    assert task.committed_profile() is None


def test_the_command_tells_how_it_is_used():
    run = subprocess.run(
        [sys.executable, "-m", "tasks.commands.validate", "--help"], capture_output=True, text=True, check=True
    )
    for words in ("python -m tasks.commands.validate", "FILE", "--model", "--output"):
        assert words in run.stdout
