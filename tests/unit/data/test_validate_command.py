"""The stage `validate` and `dpo validate`: their output, files and errors."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from dpo.common.errors import InputError
from dpo.data.ingest import write_raw_pairs
from dpo.data.readers import read_files
from dpo.engine.pretrained import load_tokenizer
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
from tests.support.validation import BAD, DATA, PARAMS, ROWS, ids, lines_of, row


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


def test_pairs_are_shown_as_the_model_reads_them(workdir, capsys, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(pq, "read_table", None)  # the table can be larger than memory
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
