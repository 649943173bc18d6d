"""The reference cache: used only when everything that it depends on is the same."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from dpo import reference
from dpo.batching import TokenRow
from dpo.errors import InputError
from dpo.logps import load_model, sequence_logps
from dpo.reference import cache_key, compute_reference, load_reference, save_reference

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
    save_reference(tmp_path / "cache", cache_key(model, tokenizer, ROWS, 64, "fp32"), ROWS, LOGPS)
    return tmp_path / "cache"


def test_round_trip_is_exact(cache, model, tokenizer):
    loaded = load_reference(cache, cache_key(model, tokenizer, ROWS, 64, "fp32"))
    assert list(loaded) == ["a", "b"]
    assert torch.equal(torch.tensor(list(loaded.values())), LOGPS)


def edit(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def flip_weight(model):
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("weights", lambda m, t, r: (flip_weight(m), r)[1]),
        ("config", lambda m, t, r: (edit(m / "config.json", b"rms_norm_eps", b"rms_norm_esp"), r)[1]),
        ("tokenizer", lambda m, t, r: (edit(m / "tokenizer.json", b'"version"', b'"versoin"'), r)[1]),
        ("template", lambda m, t, r: (setattr(t, "chat_template", "{{ messages }}"), r)[1]),
        ("rows", lambda m, t, r: r[::-1]),
        ("rows", lambda m, t, r: r[:1]),
        ("rows", lambda m, t, r: [dataclasses.replace(r[0], id="c"), r[1]]),
        ("rows", lambda m, t, r: [dataclasses.replace(r[0], prompt=(1, 3)), r[1]]),
        ("rows", lambda m, t, r: [dataclasses.replace(r[0], completions=((3, 4, 5), ())), r[1]]),
    ],
)
def test_every_input_of_the_key_is_named_when_it_differs(cache, model, tokenizer, name, alter):
    rows = alter(model, tokenizer, ROWS)
    with pytest.raises(InputError, match=f"refused: {name} differ"):
        load_reference(cache, cache_key(model, tokenizer, rows, 64, "fp32"))


def test_max_length_precision_and_engine_version_are_part_of_the_key(cache, model, tokenizer, monkeypatch):
    with pytest.raises(InputError, match="refused: max_length differ"):
        load_reference(cache, cache_key(model, tokenizer, ROWS, 65, "fp32"))
    with pytest.raises(InputError, match="refused: precision differ"):
        load_reference(cache, cache_key(model, tokenizer, ROWS, 64, "bf16"))
    monkeypatch.setattr(reference, "ENGINE_VERSION", -1)
    with pytest.raises(InputError, match="refused: engine differ"):
        load_reference(cache, cache_key(model, tokenizer, ROWS, 64, "fp32"))


def test_altered_numbers_and_absent_files_are_refused(cache, model, tokenizer):
    key = cache_key(model, tokenizer, ROWS, 64, "fp32")
    manifest = json.loads((cache / "manifest.json").read_text())
    assert set(manifest) == {*key, "logps"}
    content = bytearray((cache / "logps.parquet").read_bytes())
    content[20] ^= 1
    (cache / "logps.parquet").write_bytes(content)
    with pytest.raises(InputError, match="refused: logps differ"):
        load_reference(cache, key)
    (cache / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="no whole reference cache"):
        load_reference(cache, key)
    shutil.rmtree(cache)
    with pytest.raises(InputError, match="run the stage `reference`"):
        load_reference(cache, key)


def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr(reference, "SHARD_ROWS", 3)
    rows = [TokenRow(str(i), (1, 2, i), ((3, 4 + i), (5,))) for i in range(8)]
    key = cache_key(model, tokenizer, rows, 64, "fp32")
    engine = load_model(model)
    computed = []

    def until_the_power_fails(model, part, *args):
        if len(computed) == 6 and not (tmp_path / "power is back").exists():
            raise KeyboardInterrupt
        computed.extend(row.id for row in part)
        return sequence_logps(model, part, *args)

    monkeypatch.setattr(reference, "sequence_logps", until_the_power_fails)

    def compute():
        compute_reference(tmp_path / "cache", key, engine, rows, 100, tmp_path / "progress")

    with pytest.raises(KeyboardInterrupt):
        compute()
    assert not (tmp_path / "cache").exists()
    (tmp_path / "power is back").touch()
    compute()
    assert computed == [row.id for row in rows]
    expected = sequence_logps(engine, rows, 100)
    loaded = load_reference(tmp_path / "cache", key)
    torch.testing.assert_close(torch.tensor(list(loaded.values())), expected, rtol=1e-6, atol=1e-5)
    assert list((tmp_path / "progress").iterdir()) == []


def test_shards_of_other_inputs_are_never_taken(tmp_path, model, tokenizer, monkeypatch):
    engine, progress = load_model(model), tmp_path / "progress"
    monkeypatch.setattr(reference.shutil, "rmtree", lambda path: None)
    for seed in (0, 1):
        rows = [TokenRow("a", (1, 2), ((3, 4 + seed), (5,)))]
        key = cache_key(model, tokenizer, rows, 64, "fp32")
        compute_reference(tmp_path / f"cache {seed}", key, engine, rows, 100, progress)
        expected = sequence_logps(engine, rows, 100)
        assert torch.equal(torch.tensor(list(load_reference(tmp_path / f"cache {seed}", key).values())), expected)
    assert len(list(progress.iterdir())) == 2
