"""Both sides of the benchmark compute the same numbers, and its results have the expected fields."""

import json
import os
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks import engine, gpu, measure, trainers, validate
from benchmarks import rows as start_of_training
from benchmarks.cases import Case
from benchmarks.flops import flop_ratio, flops
from benchmarks.measure import Run
from benchmarks.page import markers, put_table
from dpo.engine.tokenization import TokenRow
from tasks.common.allocator import TRAINING
from tests.unit.test_architecture import ROOT, imported_files

CASE = Case("tiny", speed=1.5, memory=0.6, micro_batch=4)


@pytest.fixture(autouse=True)
def no_matrix_products(monkeypatch):
    monkeypatch.setattr(measure, "matmul_flops", lambda dtype, gpu: 1e11)


@pytest.fixture(scope="module")
def rows():
    """Three steps of pairs with random tokens."""
    draw = np.random.default_rng(0)

    def tokens(least, most):
        return tuple(draw.integers(4, 300, draw.integers(least, most)).tolist())

    return [TokenRow(str(i), tokens(5, 20), (tokens(1, 15), tokens(1, 15))) for i in range(24)]


@pytest.fixture
def reference(tiny_model_dir, rows):
    logps = np.reshape(engine.score_ours(CASE, tiny_model_dir, rows).values, (-1, 2)).tolist()
    return {row.id: pair for row, pair in zip(rows, logps, strict=True)}


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batch": 8, "checkpointing": True, "ours_checkpointing": True}, {"lora": True}]
)
def test_both_sides_train_to_the_same_losses(tiny_model_dir, rows, reference, changes):
    case = replace(CASE, **changes)
    ours = trainers.train_ours(case, tiny_model_dir, rows, reference)
    peer = trainers.train_peer(case, tiny_model_dir, rows, reference)
    assert len(ours.values) == 3
    assert ours.values[0] == pytest.approx(np.log(2), abs=1e-5)
    np.testing.assert_allclose(ours.values, peer.values, rtol=0, atol=1e-4)
    assert len(set(np.round(ours.values, 6))) == 3, "the loss must move"


def test_both_sides_score_the_same_log_probs(tiny_model_dir, rows):
    case = replace(CASE, train=False)
    ours = engine.score_ours(case, tiny_model_dir, rows)
    peer = trainers.score_peer(case, tiny_model_dir, rows)
    np.testing.assert_allclose(ours.values, peer.values, rtol=1e-5, atol=1e-4)
    assert min(ours.pairs_per_second, peer.pairs_per_second) > 0


def test_results_have_the_expected_fields(tiny_model_dir, rows):
    losses = [0.7, 0.6, 0.5]
    ours = [Run(speed, 1.0, 0.5, 1e11, losses) for speed in (2.0, 4.0, 3.0)]
    peer = [Run(1.0, 2.0, 0.5, 1e11, [*losses[:2], 0.5005])] * 3
    tuned = [Run(1.2, 1.6, 0.5, 1e11, losses)]
    config = AutoConfig.from_pretrained(tiny_model_dir)
    entry = engine.record(CASE, rows, config, ours, peer, tuned)
    expected = {
        "case", "dtype", "speed_ratio", "memory_ratio", "utilisation", "ours", "peer", "versions", "machine"
    }  # fmt: skip
    assert expected <= set(entry)
    assert (entry["speed_ratio"], entry["memory_ratio"], entry["status"]) == (3.0, 0.5, "same")
    assert {"pairs_per_second", "pairs_per_second_repeats", "peak_gib", "settings", "losses"} <= set(entry["ours"])
    assert entry["ours"]["tokens_per_pair"] < entry["peer"]["tokens_per_pair"]
    parameters = sum(
        weight.numel() for weight in AutoModelForCausalLM.from_pretrained(tiny_model_dir).parameters()
    )
    assert entry["memory_floor"] == pytest.approx((0.5 + 16 * parameters / 2**30) / 2)
    json.dumps(entry, allow_nan=False)
    assert entry["same_allocator"]["speed_ratio"] == pytest.approx(2.5)
    assert entry["same_allocator"]["memory_ratio"] == pytest.approx(0.625)
    table = engine.table([entry])
    flops_and_floor = f"{entry['flop_ratio']:.2f} | 0.50 (at most 0.6) | {entry['memory_floor']:.2f}"
    assert f"| tiny | 3.00 (at least 1.5) | {flops_and_floor} |" in table
    assert "agree in 1 of 1 fp32 cases" in table
    assert table.splitlines()[-1].count("|") == 9
    peer = [Run(1.0, 2.0, 0.5, 1e11, [*losses[:2], 0.51])]
    failed = engine.record(CASE, rows, config, ours, peer, tuned)
    assert failed["status"] == "failed"
    assert "agree in 0 of 1 fp32 cases" in engine.table([failed])


def test_flops_by_hand():
    # Two layers of 9,216 weights each: q and o 32 * 32, k and v 32 * 16, three MLP matrices 32 * 64.
    # 3 + 2 + 1 tokens, 3 of them in completions. Unmasked: 6 in the prompt, 2 * 3 + 3 and 3 + 1 in completions.
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    row = TokenRow("a", (5, 6, 7), ((8, 9), (10,)))
    forward = 2 * (2 * 9216 * 6 + 32 * 320 * 3) + 4 * 2 * 4 * 8 * (6 + 9 + 4)
    assert flops(replace(CASE, train=False), [row], config) == forward
    assert flops(CASE, [row], config) == 3 * forward
    # TRL: two rows of 5 tokens, all projected, 25 (query, key) pairs each; its backward pass projects again.
    layers, head = 2 * 2 * 9216 * 10 + 4 * 2 * 4 * 8 * 2 * 25, 2 * 32 * 320 * 10
    assert flop_ratio(replace(CASE, train=False), [row], config) == (layers + head) / forward
    assert flop_ratio(CASE, [row], config) == (3 * layers + 4 * head) / (3 * forward)
    both = replace(CASE, checkpointing=True, ours_checkpointing=True)
    assert flop_ratio(both, [row], config) == 4 * (layers + head) / (4 * forward - 2 * 32 * 320 * 3)
    # On a GPU TRL projects the 3 completion tokens only.
    head = 2 * 32 * 320 * 3
    assert flop_ratio(replace(CASE, gpu=True, train=False), [row], config) == (layers + head) / forward
    assert flop_ratio(replace(CASE, gpu=True), [row], config) == (3 * layers + 4 * head) / (3 * forward)


def test_put_table_keeps_the_text_around_the_table(tmp_path, tiny_model_dir, rows):
    page, (start, end) = tmp_path / "benchmarks.md", markers("engine")
    page.write_text(f"# Head\n{start}\nold\n{end}\ntail\n")
    run = Run(1.0, 1.0, 0.5, 1e11, [0.7, 0.6, 0.5])
    entry = engine.record(CASE, rows, AutoConfig.from_pretrained(tiny_model_dir), [run], [run], [run])
    put_table(page, "engine", engine.table([entry]))
    put_table(page, "engine", engine.table([entry]))
    text = page.read_text()
    assert text.startswith("# Head\n")
    assert text.endswith("\ntail\n")
    assert "old" not in text
    assert text.count("| tiny |") == 1


def test_gpu_table_shows_the_measurements(monkeypatch):
    case = replace(gpu.CASES[0], pairs_per_step=2, micro_batch=1)
    pairs = gpu.random_rows(case, steps=2)
    assert [len(row.completions) for row in pairs] == [2] * 6
    assert abs(np.mean([row.tokens for row in pairs]) - 2048) < 300
    monkeypatch.setattr(gpu, "alone", lambda function: "a GPU")
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda package: "1.0")
    ours = [Run(speed, 20.0, 0.5, 8e14, [0.7, 0.6]) for speed in (20.0, 30.0)]
    entry = gpu.record(case, pairs, ours, [Run(10.0, 40.0, 0.5, 7e14, [0.7, 0.61])] * 2)
    assert (entry["speed_ratio"], entry["memory_ratio"]) == (2.5, 0.5)
    assert entry["difference"] == pytest.approx(0.01)
    work = flops(case, pairs[2:], gpu.LLAMA_1B) / 4
    assert entry["utilisation"] == pytest.approx(25 * work / 8e14)
    states = 16 * 1_235_814_400
    assert entry["memory_floor"] == pytest.approx(states / 2**30 / 40)
    assert states < entry["planned_gib"] * 2**30 < 2 * states
    lines = gpu.table([entry]).splitlines()
    line = next(line for line in lines if line.startswith("| gpu_long"))
    assert [line for line in lines if "**not run**" in line] == [
        f"| {case.name} | **not run** | | | | | | |" for case in gpu.CASES[1:]
    ]
    assert line.startswith("| gpu_long | 2.50 (at least 1.5) |")
    assert line.endswith("| 25.0 / 10.0 | 20.0 / 40.0 |")


def test_gpu_benchmark_imports_only_what_it_checks_beforehand():
    files, names = imported_files(ROOT / "benchmarks/gpu.py", on_first_use=False)
    trainers_files, _ = imported_files(ROOT / "benchmarks/trainers.py", on_first_use=False)
    assert {file.parts[0] for file in files | trainers_files} == {"benchmarks", "dpo"}
    packages = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"benchmarks", "dpo"}
    assert packages <= set(gpu.PACKAGES)


def test_gpu_benchmark_names_all_missing_packages_at_once(monkeypatch, capsys):
    absent = {"trl", "liger_kernel"}
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in absent else name)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "install them with `pip install liger-kernel trl`" in capsys.readouterr().err


def test_gpu_benchmark_continues_with_the_cases_that_have_no_result(monkeypatch, tmp_path):
    measured, here = [], {"versions": {"torch": "1"}, "machine": {"gpu": "a GPU"}}

    def compare(case, model, steps, repeats):
        measured.append(case.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        setting = asdict(case) | {"steps": steps, "repeats": repeats}
        return {"case": case.name, "setting": setting, **here}

    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "environment", lambda: here)
    monkeypatch.setattr(gpu, "alone", lambda *args: None)
    monkeypatch.setattr(gpu, "compare", compare)
    names = [case.name for case in gpu.CASES]
    with pytest.raises(KeyboardInterrupt):
        gpu.measure_all(gpu.CASES, 3, 1, again=False)
    gpu.measure_all(gpu.CASES, 3, 1, again=False)
    assert measured == [*names[:3], *names[2:]]
    gpu.measure_all(gpu.CASES, 3, 1, again=False)
    assert len(measured) == 5
    gpu.measure_all(gpu.CASES[:1], 3, 2, again=False)
    assert measured[5:] == names[:1]
    assert [entry["case"] for entry in json.loads(gpu.RESULTS.read_text())] == names


def test_validation_benchmark_writes_faulty_pairs_and_a_table(tmp_path):
    path = tmp_path / "pairs.jsonl"
    validate.write_pairs(path, 200, ["One sentence here.", "Another one there.", "And a third."])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 200
    assert sum(not row["chosen"].strip() for row in rows) == 2
    assert validate.table([{"rows": 2000, "gigabytes": 1, "seconds": 4, "peak_gib": 2}]).splitlines()[-1] == (
        "| 2,000 | 1.000 | 4.0 | 500 | 2.00 |"
    )


def test_alone_sets_variables_in_the_new_process_only():
    before = dict(os.environ)
    for name, value in TRAINING.items():
        assert measure.alone(os.getenv, name, **TRAINING) == value
    assert dict(os.environ) == before


@pytest.mark.slow
def test_the_start_of_a_training_is_measured():
    result = start_of_training.measure(5000)
    assert result["table_bytes"] == pytest.approx(5000 * 600 * 4, rel=0.1)
    assert result["seconds"] > result["open_seconds"] > 0
    assert result["two_pss_bytes"] < 0.8 * result["two_rss_bytes"]
    assert start_of_training.table([result]).splitlines()[-1].startswith("| 5,000 | 0.01 |")
