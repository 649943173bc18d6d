"""The reference cache: keys, resumption, several processes and memory."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from accelerate import PartialState
from transformers import AutoTokenizer

from dpo.common.errors import InputError
from dpo.engine import reference_cache, token_table
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.reference_cache import (
    ReferenceLogps,
    cache_key,
    compute_reference,
    load_reference,
    policy_key,
    shard_table,
    write_cache,
)
from dpo.engine.settings import EngineSettings
from dpo.engine.token_table import open_table, write_table
from dpo.engine.tokenization import TokenRow, encode_pairs
from tasks import reference_logprobs as stage

ROOT = Path(__file__).parents[3]
ENGINE = EngineSettings(max_length=128, max_tokens_per_microbatch=400, precision="fp32", compile=False)
KEYED = dataclasses.replace(ENGINE, max_length=64)
"""Settings of the caches of `ROWS`."""

ROWS = [TokenRow("a", (1, 2), ((3, 4), (5,))), TokenRow("b", (1, 2), ((6,), (7, 8)))]
LOGPS = torch.tensor([[-1.5, -2.25], [-0.1, -30.7]])


@pytest.fixture
def model(tmp_path, tiny_model_dir):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.fixture
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def cache(tmp_path, model, tokenizer):
    write_cache(tmp_path / "cache", cache_key(model, tokenizer, ROWS, KEYED), [shard_table(ROWS, LOGPS)])
    return tmp_path / "cache"


def test_round_trip_is_exact(cache, model, tokenizer):
    loaded = load_reference(cache, cache_key(model, tokenizer, ROWS, KEYED))
    assert list(loaded) == ["a", "b"]
    assert torch.equal(torch.tensor(list(loaded.values())), LOGPS)


def test_pairs_are_found_by_id_in_any_order_and_number_of_record_batches(tmp_path, model, tokenizer, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    rows = [TokenRow(f"pair {i}", (1, i), ((3,), (4, 5))) for i in torch.randperm(400, generator=draw).tolist()]
    logps = torch.randn(400, 2, generator=draw)
    parts = [shard_table(rows[start : start + 150], logps[start : start + 150]) for start in (0, 150, 300)]
    key = cache_key(model, tokenizer, rows, KEYED)
    write_cache(tmp_path / "cache", key, parts)
    opened = load_reference(tmp_path / "cache", key)
    expected = dict(zip([row.id for row in rows], map(tuple, logps.double().tolist()), strict=True))
    assert dict(opened) == expected
    assert (len(opened), list(opened)) == (400, list(expected))
    assert opened.missing(["pair 7", "pair 400", "", "pair 399"]) == ["pair 400", ""]
    with pytest.raises(KeyError, match="pair 400"):
        opened["pair 400"]
    in_memory = ReferenceLogps.of(expected)
    assert dict(in_memory) == expected
    assert in_memory.digest == opened.digest
    assert ReferenceLogps.of({**expected, "pair 7": (0.0, 1.0)}).digest != opened.digest
    assert ReferenceLogps.of(dict(reversed(expected.items()))).digest != opened.digest
    assert not ReferenceLogps.of({})
    monkeypatch.setattr(reference_cache, "_hashes", lambda ids: np.zeros(len(ids), np.uint64))
    assert dict(load_reference(tmp_path / "cache", key)) == expected, "ids with equal hashes"


def edit(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def flip_weight(model):
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def changed(**fields):
    return dataclasses.replace(ROWS[0], **fields)


def reset(made, **settings):
    made["engine"] = dataclasses.replace(KEYED, **settings)


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("weights", lambda made: flip_weight(made["model"])),
        ("config", lambda made: edit(made["model"] / "config.json", b"rms_norm_eps", b"rms_norm_esp")),
        ("tokenizer", lambda made: edit(made["model"] / "tokenizer.json", b'"version"', b'"versoin"')),
        ("template", lambda made: setattr(made["tokenizer"], "chat_template", "{{ messages }}")),
        ("max_length", lambda made: reset(made, max_length=65)),
        ("precision", lambda made: reset(made, precision="bf16")),
        ("compile", lambda made: reset(made, compile=True)),
        ("rows", lambda made: made.update(rows=ROWS[::-1])),
        ("rows", lambda made: made.update(rows=ROWS[:1])),
        ("rows", lambda made: made.update(rows=[changed(id="c"), ROWS[1]])),
        ("rows", lambda made: made.update(rows=[changed(prompt=(1, 3)), ROWS[1]])),
        ("rows", lambda made: made.update(rows=[changed(completions=((3, 4, 5), ())), ROWS[1]])),
    ],
)
def test_the_error_names_the_input_that_differs(cache, model, tokenizer, name, alter):
    made = {"model": model, "tokenizer": tokenizer, "rows": ROWS, "engine": KEYED}
    alter(made)
    with pytest.raises(InputError, match=f"refused: {name} differ from"):
        load_reference(cache, cache_key(**made))


def test_another_engine_version_is_an_error(cache, model, tokenizer, monkeypatch):
    monkeypatch.setattr(reference_cache, "ENGINE_VERSION", -1)
    with pytest.raises(InputError, match="refused: engine differ from"):
        load_reference(cache, cache_key(model, tokenizer, ROWS, KEYED))


def test_altered_and_missing_files_are_an_error(cache, model, tokenizer):
    key = cache_key(model, tokenizer, ROWS, KEYED)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert set(manifest) == {*key, "logps"}
    content = bytearray((cache / "logps.arrow").read_bytes())
    content[20] ^= 1
    (cache / "logps.arrow").write_bytes(content)
    with pytest.raises(InputError, match="refused: logps differ"):
        load_reference(cache, key)
    (cache / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="no complete reference cache"):
        load_reference(cache, key)
    shutil.rmtree(cache)
    with pytest.raises(InputError, match="run the stage `reference_logprobs`"):
        load_reference(cache, key)


def write_pairs(path, count):
    path.parent.mkdir(exist_ok=True)
    pairs = [
        {
            "id": f"pair {i}",
            "prompt": f"Say something about film {i}.",
            "turns": None,
            "chosen": f"Film {i} is a joy and a delight.",
            "rejected": f"Film {i} is a bore.",
        }
        for i in range(count)
    ]
    pd.DataFrame(pairs).to_parquet(path)
    return pairs


@pytest.fixture
def compute(tmp_path, model, tokenizer):
    """Compute the reference of a table in this process."""
    engine = load_model(model)

    def run(pairs, folder=tmp_path / "cache"):
        write_table(tmp_path / "tokens", pairs, tokenizer, ENGINE.max_length)
        table = open_table(tmp_path / "tokens", pairs, tokenizer, ENGINE.max_length)
        key, progress = policy_key(model, tokenizer, ENGINE), tmp_path / ".reference-progress"
        compute_reference(folder, key, table, engine, ENGINE, progress, PartialState(cpu=True))

    return run


def expected(folder, model, tokenizer, pairs):
    """Return the log-probs in the cache and the expected ones, both [R, 2]."""
    rows = encode_pairs(pairs, tokenizer, ENGINE.max_length)
    loaded = load_reference(folder, cache_key(model, tokenizer, rows, ENGINE))
    assert list(loaded) == [row.id for row in rows]
    return torch.tensor(list(loaded.values())), sequence_logps(
        load_model(model), rows, ENGINE.max_tokens_per_microbatch
    )


def stop_after(rows, monkeypatch):
    """Interrupt the computation after some rows. Return a list that receives the ids of scored rows."""
    scored = []

    def interrupted(model, part, *args):
        if len(scored) == rows:
            raise KeyboardInterrupt
        scored.extend(row.id for row in part)
        return sequence_logps(model, part, *args)

    monkeypatch.setattr(reference_cache, "sequence_logps", interrupted)
    return scored


def test_an_interrupted_computation_resumes(tmp_path, model, tokenizer, compute, monkeypatch):
    monkeypatch.setattr(reference_cache, "SHARD_ROWS", 3)
    monkeypatch.setattr(reference_cache, "JOINED_SHARDS", 2)
    pairs = write_pairs(tmp_path / "pairs.parquet", 8)
    first = stop_after(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "pairs.parquet")
    assert not (tmp_path / "cache").exists()
    second = stop_after(-1, monkeypatch)
    compute(tmp_path / "pairs.parquet")
    assert first + second == [pair["id"] for pair in pairs]
    torch.testing.assert_close(*expected(tmp_path / "cache", model, tokenizer, pairs), rtol=1e-6, atol=1e-5)
    assert list((tmp_path / ".reference-progress").iterdir()) == []


@pytest.mark.parametrize("change", ["text", "model"])
def test_a_finished_shard_of_other_inputs_is_not_used(tmp_path, model, tokenizer, compute, monkeypatch, change):
    monkeypatch.setattr(reference_cache, "SHARD_ROWS", 3)
    pairs = write_pairs(tmp_path / "pairs.parquet", 8)
    stop_after(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "pairs.parquet")
    if change == "text":
        pairs[4]["rejected"] = "Film 4 is a boar."
        pd.DataFrame(pairs).to_parquet(tmp_path / "pairs.parquet")
    else:
        edit(model / "config.json", b"1e-06", b"1e-03")
    scored = stop_after(-1, monkeypatch)
    compute(tmp_path / "pairs.parquet")
    again = pairs[3:] if change == "text" else pairs
    assert scored == [pair["id"] for pair in again]


def test_a_changed_character_of_a_pair_is_an_error(tmp_path, model, tokenizer, compute):
    pairs = write_pairs(tmp_path / "pairs.parquet", 8)
    compute(tmp_path / "pairs.parquet")
    pairs[4]["rejected"] = "Film 4 is a bore!"
    with pytest.raises(InputError, match="refused: rows differ from"):
        expected(tmp_path / "cache", model, tokenizer, pairs)


@pytest.mark.slow
def test_two_processes_resume_the_computation_of_one(tmp_path, model, tokenizer, monkeypatch):
    model = shutil.copytree(model, tmp_path / "models/reference")
    (tmp_path / "params.yaml").write_text(
        (ROOT / "params.yaml").read_text().replace("max_length: 512", "max_length: 128")
    )
    pairs = write_pairs(tmp_path / "data/train.parquet", 900)
    held_out = write_pairs(tmp_path / "data/eval.parquet", 20)
    for name in ("train", "eval"):
        write_table(tmp_path / "tokens" / name, tmp_path / f"data/{name}.parquet", tokenizer, ENGINE.max_length)
    first = stop_after(256, monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stage.main()
    logs = tmp_path / "logs"
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--redirects=3", f"--log-dir={logs}"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "tasks.reference_logprobs"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    outputs = ["".join(path.read_text() for path in logs.glob(f"*/attempt_0/{rank}/*.log")) for rank in (0, 1)]
    assert done.returncode == 0, outputs
    titles = (
        "train pairs 1 to",
        "train pairs 257 to",
        "train pairs 513 to",
        "train pairs 769 to",
        "eval pairs 1 to",
    )
    assert [[title in text for title in titles] for text in outputs] == [
        [False, False, True, False, True],
        [False, True, False, True, False],
    ]
    assert len(first) == 256
    for folder, rows in (("train", pairs), ("eval", held_out)):
        torch.testing.assert_close(
            *expected(tmp_path / f"reference/{folder}", model, tokenizer, rows), rtol=1e-6, atol=1e-5
        )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path, compute, monkeypatch):
    monkeypatch.setattr(reference_cache, "SHARD_ROWS", 64)
    monkeypatch.setattr(reference_cache, "JOINED_SHARDS", 4)
    monkeypatch.setattr(token_table, "PAIRS_AT_ONCE", 64)
    read = []

    def score(model, rows, *args):
        read[-1] = max(read[-1], pa.total_allocated_bytes() - before)
        return torch.zeros(len(rows), 2)

    monkeypatch.setattr(reference_cache, "sequence_logps", score)
    python, path = [], tmp_path / "pairs.parquet"
    for count in (256, 512, 3072):  # the first call fills caches
        pairs = write_pairs(path, count)
        table = pd.DataFrame(pairs).assign(source=[os.urandom(3000).hex() for _ in pairs])
        table.to_parquet(path, write_batch_size=64)
        del pairs, table
        read.append(0)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        compute(path)
        python.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert python[2] < 1.25 * python[1]
    assert read[2] < path.stat().st_size / 3
