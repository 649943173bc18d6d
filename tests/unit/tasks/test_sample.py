"""`dpo sample`: responses in the layout of rated completions, which is read as pairs after people rank them."""

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from dpo.config import load_params
from dpo.data.ingest import write_raw_pairs
from dpo.data.readers import read_files
from tasks.commands.cli import app

ROOT = Path(__file__).parents[3]
PROMPTS = [
    {"prompt": "Say something about films.", "split": "train"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And books?"}]},
]


@pytest.fixture
def sample(tiny_model_dir, tmp_path, monkeypatch):
    """Return a function that writes prompts, runs the command, and returns its exit code, error and rows."""
    monkeypatch.chdir(ROOT)

    def run(prompts, name="ranked.jsonl", checkpoint=tiny_model_dir, tokens=400):
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        output = tmp_path / name
        command = ["sample", str(tmp_path / "prompts.jsonl"), "--output", str(output), "--responses", "16"]
        command += ["--max-new-tokens", str(tokens), *(["--checkpoint", str(checkpoint)] if checkpoint else [])]
        done = CliRunner().invoke(app, command)
        made = output.read_text() if output.exists() else ""
        return str(done.exception or ""), [json.loads(line) for line in made.splitlines()]

    return run


def test_ranked_responses_become_pairs(sample, tmp_path):
    error, rows = sample(PROMPTS)
    assert not error
    assert [row.keys() for row in rows] == [{*prompt, "responses", "ranks"} for prompt in PROMPTS]
    for row in rows:
        count = len(row["responses"])
        assert 2 <= count == len({*row["responses"]}) <= 16
        assert row["ranks"] == [None] * count
    assert sample(PROMPTS, "again.jsonl")[1] == rows, "equal seeds give equal responses"

    raw, params = tmp_path / "raw.parquet", load_params().data
    write_raw_pairs(read_files([str(tmp_path / "ranked.jsonl")]), raw, "ranked", params)
    assert pd.read_parquet(raw)["chosen"].isna().all(), "nothing is read before the responses are ranked"
    ranked = [row | {"ranks": [*range(len(row["responses"]), 0, -1)]} for row in rows]  # the last one is the best
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    write_raw_pairs(read_files([str(tmp_path / "ranked.jsonl")]), raw, "ranked", params)
    pairs = pd.read_parquet(raw)
    assert pairs["chosen"].tolist() == [row["responses"][-1] for row in rows]
    assert pairs["rejected"].tolist() == [row["responses"][0] for row in rows]
    assert pairs["prompt"].tolist()[0] == PROMPTS[0]["prompt"]
    assert pairs["split"].tolist()[0] == "train"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts"),
        ([{"prompt": "a", "chosen": "b"}], "line 1: field 'chosen' is not a part of a prompt; remove it"),
        ([{"text": "a"}], "line 1: field 'prompt' is missing or null; correct the row"),
        (
            [PROMPTS[0], {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            "line 2: the prompt ends with the assistant's turn; remove that turn",
        ),
    ],
)
def test_rows_that_are_not_prompts_are_refused(sample, prompts, message):
    error, rows = sample(prompts, checkpoint=None)
    assert message in error
    assert not rows


def test_wrong_places_and_lengths_are_refused_and_nothing_is_overwritten(sample, tmp_path):
    assert "absent: no checkpoint;" in sample(PROMPTS, checkpoint="absent")[0]
    assert "--max-new-tokens: 512 leaves no room" in sample(PROMPTS, tokens=512)[0]
    error, rows = sample(PROMPTS, tokens=1)
    assert "prompts.jsonl: no prompt has two different responses; " in error
    assert not rows
    (tmp_path / "ranked.jsonl").write_text("{}\n")
    error, rows = sample(PROMPTS)
    assert "ranked.jsonl: the file exists; move it, or choose another --output" in error
    assert rows == [{}]


def test_without_a_champion_a_checkpoint_is_needed(sample, monkeypatch):
    from tasks.tracking import offline, registry

    monkeypatch.setattr(offline, "connect", lambda: None)
    monkeypatch.setattr(registry, "champion", lambda: None)
    assert (
        "MLflow: there is no champion yet; name a folder with --checkpoint" in sample(PROMPTS, checkpoint=None)[0]
    )
