"""Both sides of the benchmark compute the same numbers, and its results have the expected fields."""

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks import engine, gpu, gpu_cases, measure, trainers, validate
from benchmarks import rows as start_of_training
from benchmarks.cases import Case
from benchmarks.flops import flop_ratio, flops
from benchmarks.measure import Run
from benchmarks.page import markers, put_table
from dpo.engine.flops import shape_of
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


def test_gpu_table_shows_the_measurements_and_the_cases_that_were_not_run():
    case = gpu_cases.CASES[0]
    pairs = gpu_cases.random_rows(case, steps=1)
    assert [len(row.completions) for row in pairs] == [2] * 16
    assert abs(np.mean([row.tokens for row in pairs]) - 2048) < 300
    ours = [Run(speed, 20.0, 0.5, 8e14, [0.7, 0.6]) for speed in (2.0, 3.0)]
    entry = gpu_cases.record(case, pairs, ours, [Run(1.0, 40.0, 0.5, 7e14, [0.7, 0.61])] * 2)
    assert (entry["speed_ratio"], entry["memory_ratio"]) == (2.5, 0.5)
    assert entry["difference"] == pytest.approx(0.01)
    work = flops(case, pairs[8:], gpu_cases.SHAPES["8b"]) / 8
    assert entry["ours"]["utilisation"] == pytest.approx(2.5 * work / 8e14)
    lines = gpu_cases.table([entry, {"case": "tests", "summary": "9 passed"}]).splitlines()
    line = next(line for line in lines if line.startswith("| lora_8b"))
    assert line.startswith("| lora_8b | 2.50 (at least 2.0) |")
    assert "| 0.50 (at most 0.8) |" in line
    assert f"(at least 50) | 2.5 / 1.0 | 20.0 / 40.0 | {entry['planned_gib']:.1f} |" in line
    assert 2 * 8 < entry["planned_gib"] < 2 * 22, "weights are in bf16"
    assert "800.0 TFLOP/s" in lines[0]
    assert [each.split(" | ")[0] for each in lines if "**not run**" in each] == [
        f"| {case.name}" for case in gpu_cases.CASES if case.name not in ("lora_8b", "tests")
    ]
    assert any(line.startswith("| tests | 9 passed |") for line in lines)
    assert {each.count("|") for each in lines[2:]} == {9}


def test_the_page_has_the_table_of_the_results_of_validation():
    start, end = markers("validate")
    results = json.loads((ROOT / validate.RESULTS).read_text())
    assert (ROOT / validate.PAGE).read_text().split(start)[1].split(end)[0].strip() == validate.table(results)


def test_the_page_has_every_gpu_case():
    page = (ROOT / gpu.PAGE).read_text()
    start, end = markers("gpu")
    table = page.split(start)[1].split(end)[0]
    assert all(f"| {case.name} |" in table for case in gpu_cases.CASES)


@pytest.mark.parametrize(("shape", "parameters"), [("8b", 8_030_261_248), ("1b", 1_235_814_400)])
def test_gpu_shapes_are_those_of_llama(shape, parameters):
    assert shape_of(gpu_cases.SHAPES[shape]).parameters == parameters


@pytest.mark.slow
def test_every_gpu_case_runs_on_the_cpu_with_a_tiny_model(monkeypatch, capsys):
    entries, measured = [], gpu_cases.measure
    monkeypatch.setattr(gpu_cases, "measure", lambda *args: entries.append(measured(*args)) or entries[-1])
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--steps", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main() == 0
    output = capsys.readouterr().out
    assert "Dry run" in output
    assert "**not run**" not in output
    assert [entry["case"] for entry in entries] == [case.name for case in gpu_cases.CASES]
    by_case = {entry["case"]: entry for entry in entries}
    for name in ("lora_8b", "nf4_8b", "full_1b", "lora_8b_checkpointing"):
        assert by_case[name]["ours"]["values"][0] == pytest.approx(np.log(2), abs=1e-5)
        assert by_case[name]["difference"] < 0.02
    assert by_case["reference_8b"]["difference"] < 0.5
    for side in ("ours", "peer"):
        lengths = by_case["sampling_8b"][side]["values"]
        assert len(lengths) == max(lengths) == 8
    assert "skipped" in by_case["tests"]["summary"]


def test_gpu_benchmark_imports_only_what_it_checks_beforehand():
    files, names = imported_files(ROOT / "benchmarks/gpu_cases.py", on_first_use=False)
    assert {file.parts[0] for file in files} == {"benchmarks", "dpo"}
    files, of_tests = imported_files(ROOT / gpu_cases.TESTS, on_first_use=False)
    assert {file.parts[0] for file in files} == {"dpo", "tests"}
    standard = set(sys.stdlib_module_names)
    packages = {name.split(".")[0] for name in names | of_tests} - standard - {"benchmarks", "dpo", "tests"}
    assert packages <= {name.split(".")[0].replace("-", "_") for name in gpu.PACKAGES}
    _, names = imported_files(ROOT / "benchmarks/gpu.py", on_first_use=False)
    assert {name.split(".")[0] for name in names} <= standard | {"benchmarks", "dpo"}


def test_gpu_benchmark_names_all_missing_packages_at_once(monkeypatch, capsys, tmp_path):
    absent = {"trl", "liger-kernel", "ruamel.yaml"}
    monkeypatch.setattr(gpu, "is_installed", lambda name: name not in absent)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    error = capsys.readouterr().err
    assert "install them with `pip install liger-kernel ruamel.yaml trl`" in error
    assert "60 MiB" in error
    (tmp_path / "liger_kernel-1.0-py3-none-any.whl").touch()
    (tmp_path / "ruamel_yaml-1.0-py3-none-any.whl").touch()
    monkeypatch.setattr(sys, "argv", ["gpu", "--wheels", str(tmp_path)])
    assert gpu.main() == 2
    assert "`pip install trl`" in capsys.readouterr().err
    (tmp_path / "trl-1.0-py3-none-any.whl").touch()
    assert gpu.main() == 0
    monkeypatch.setattr(gpu, "WHEELS_MIB", -1)
    assert gpu.main() == 2
    assert f"{tmp_path}: the wheels have 0.0 MiB" in capsys.readouterr().err


@pytest.fixture
def gpu_run(monkeypatch, tmp_path):
    """Return a function that measures all cases, and the list of measured cases. The second case fails once."""
    measured, clock = [], [0.0]

    def measure(case, options):
        measured.append(case.name)
        clock[0] += 60
        if len(measured) == 2:
            raise RuntimeError("out of memory")
        return {"case": case.name}

    def run(*arguments):
        options = gpu.parser().parse_args([*arguments, "--output", str(tmp_path / "gpu.json")])
        return gpu.measure_all(gpu_cases.CASES, options)

    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_cases, "environment", lambda: {"versions": {"torch": "1"}})
    monkeypatch.setattr(gpu, "measure", measure)
    return run, measured


def test_gpu_benchmark_continues_with_the_cases_that_have_no_result(gpu_run, tmp_path):
    run, measured = gpu_run
    names = [case.name for case in gpu_cases.CASES]
    assert run() == [names[1]]
    assert measured == names
    assert run() == []
    assert measured[len(names) :] == [names[1]]
    assert run() == []
    assert len(measured) == len(names) + 1
    assert run("--repeats", "2") == []
    assert measured[len(names) + 1 :] == names
    assert [entry["case"] for entry in json.loads((tmp_path / "gpu.json").read_text())] == names


def test_gpu_benchmark_starts_no_case_that_would_pass_the_time_limit(gpu_run):
    run, measured = gpu_run
    names = [case.name for case in gpu_cases.CASES]
    assert run("--minutes", "3.5") == [names[1], *names[3:]]
    assert measured == names[:3]


def test_validation_benchmark_writes_faulty_pairs_and_a_table(tmp_path):
    path = tmp_path / "pairs.jsonl"
    validate.write_pairs(path, 200, ["One sentence here.", "Another one there.", "And a third."])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 200
    assert sum(not row["chosen"].strip() for row in rows) == 2
    assert validate.table([{"rows": 2000, "gigabytes": 1, "seconds": 4, "peak_gib": 2}]).splitlines()[-1] == (
        "| 2,000 | 1.000 | 4.0 | 500 | 2.00 | **not run** |"
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
