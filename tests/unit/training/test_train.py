"""Training: its start, its log, invariances, and what it saves."""

import dataclasses
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.reference_cache import cache_key, load_reference, shard_table, write_cache
from dpo.engine.tokenization import encode_pairs
from dpo.training.callbacks import Callback
from dpo.training.settings import LoraSettings
from dpo.training.train import save_checkpoint, train_dpo, train_sft
from tests.support.models import make_model
from tests.support.training import (
    LORA,
    LOSSES,
    PARAMS,
    dpo_params,
    every_loss,
    make_pairs,
    make_reference,
    make_rows,
    online_reference,
    run_dpo,
    sft_params,
    steps_of,
    trial,
)

METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logratios/chosen",
    "logratios/rejected",
}


@pytest.mark.parametrize("max_tokens_per_microbatch", [60, 10_000])
def test_training_starts_at_margin_zero_and_loss_log_2_and_improves(
    tiny_model_dir, tmp_path, max_tokens_per_microbatch
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = encode_pairs(make_pairs(18), tokenizer, 200)
    logps = sequence_logps(load_model(tiny_model_dir), rows, 1000)
    key = cache_key(tiny_model_dir, tokenizer, rows, PARAMS.engine)
    write_cache(tmp_path / "cache", key, [shard_table(rows, logps)])
    log, _ = run_dpo(
        tiny_model_dir,
        rows,
        load_reference(tmp_path / "cache", key),
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        epochs=3,
    )
    first, last = log[0], log[-1]
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["rewards/accuracies"] == 0.5, "ties count one half"
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert last["loss"] < math.log(2) - 0.05
    assert last["rewards/margins"] > 0.1


def test_each_step_has_a_log_entry_with_the_names_of_trl(tiny_model_dir, rows, reference):
    log, _ = run_dpo(tiny_model_dir, rows, reference, epochs=2)
    assert [entry["step"] for entry in log] == list(range(1, 11))
    assert [entry["epoch"] for entry in log] == pytest.approx([step / 5 for step in range(1, 11)])
    assert all(entry.keys() >= METRICS | {"loss", "grad_norm", "learning_rate", "epoch"} for entry in log)


def test_logged_metrics_are_means_over_the_pairs_of_the_step(tiny_model_dir, rows, reference):
    shifted = {row.id: (reference[row.id][0] - i, reference[row.id][1] + 2 * i) for i, row in enumerate(rows)}
    for max_tokens_per_microbatch in (60, 10_000):
        log, _ = run_dpo(
            tiny_model_dir,
            rows,
            shifted,
            beta=0.5,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            learning_rate=1e-12,
        )
        steps = steps_of(rows, 3)
        assert len(log) == len(steps) == 5
        for entry, step in zip(log, steps, strict=True):
            places = [rows.index(row) for row in step]
            count = len(places)
            # log-ratios are i and -2i by construction: margin 0.5 * 3i
            expected = {
                "rewards/chosen": sum(0.5 * i for i in places) / count,
                "rewards/rejected": sum(-1.0 * i for i in places) / count,
                "rewards/margins": sum(1.5 * i for i in places) / count,
                "logps/chosen": sum(reference[row.id][0] for row in step) / count,
                "logps/rejected": sum(reference[row.id][1] for row in step) / count,
                "logratios/chosen": sum(places) / count,
                "logratios/rejected": -2 * sum(places) / count,
                "loss": sum(math.log1p(math.exp(-1.5 * i)) for i in places) / count,
            }
            assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
            if 0 not in places:
                assert entry["rewards/accuracies"] == 1.0


def test_the_last_partial_step_is_a_mean_over_its_own_pairs(tiny_model_dir, rows, reference):
    assert len(steps_of(rows, 3)[-1]) == 2
    for max_tokens_per_microbatch in (60, 10_000):
        log, _ = run_dpo(
            tiny_model_dir,
            rows,
            reference,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            learning_rate=1e-12,
        )
        assert log[-1]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_results_do_not_depend_on_micro_batches(tiny_model_dir, rows, reference, optimizer):
    changes = {
        "optimizer": optimizer,
        "epochs": 2,
        "learning_rate": 1e-4,
        "schedule": "cosine",
        "warmup_ratio": 0.2,
    }
    expected, expected_weights = run_dpo(tiny_model_dir, rows, reference, **changes)
    for max_tokens_per_microbatch in (160, 1):
        parts, parts_weights = run_dpo(
            tiny_model_dir, rows, reference, max_tokens_per_microbatch=max_tokens_per_microbatch, **changes
        )
        assert len(parts) == len(expected) == 10
        for name in ("loss", "grad_norm", "learning_rate", *METRICS - {"rewards/accuracies"}):
            assert [e[name] for e in parts] == pytest.approx([e[name] for e in expected], rel=1e-4, abs=1e-4), name
        for name, weight in expected_weights.items():
            torch.testing.assert_close(parts_weights[name], weight, rtol=1e-4, atol=2e-5)


def test_callbacks_receive_every_entry_and_the_time_at_the_end(tiny_model_dir, rows, reference):
    seen = []

    class Recorder(Callback):
        def on_start(self, resumed_step, history):
            seen.append(("start", resumed_step, list(history)))

        def on_log(self, entry):
            seen.append(entry)

        def on_end(self):
            seen.append("end")

    log = train_dpo(
        load_model(tiny_model_dir), rows, reference, dpo_params(), trial(), max_tokens_per_microbatch=10_000,
        callbacks=[Recorder()],
    )  # fmt: skip
    assert seen[0] == ("start", 0, [])
    assert seen[1:6] == log
    assert seen[6].keys() == {"step", "train_runtime"}
    assert seen[6]["step"] == 5
    assert seen[6]["train_runtime"] > 0
    assert seen[7:] == ["end"]


def test_one_process_accumulates_in_place(tiny_model_dir, rows, reference):
    model = load_model(tiny_model_dir)
    train_dpo(model, rows, reference, dpo_params(), trial(), max_tokens_per_microbatch=10_000)
    assert model.accumulate_in_place


def test_weights_are_equal_bit_for_bit_with_the_same_seed_and_differ_with_another(tiny_model_dir, rows, reference):
    first, again, other = (run_dpo(tiny_model_dir, rows, reference, seed=seed)[1] for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_row_without_reference_is_a_key_error(tiny_model_dir, rows, reference):
    partial = {name: value for name, value in reference.items() if name != "pair 5"}
    with pytest.raises(KeyError, match=r"1 pairs.*'pair 5'"):
        run_dpo(tiny_model_dir, rows, partial)


@pytest.mark.parametrize("max_tokens_per_microbatch", [60, 10_000])
@pytest.mark.parametrize("completions", [1, 2])
def test_sft_loss_is_the_mean_over_the_completion_tokens_of_a_step(
    tiny_model_dir, rows, max_tokens_per_microbatch, completions
):
    rows = [dataclasses.replace(row, completions=row.completions[:completions]) for row in rows]
    log = train_sft(
        load_model(tiny_model_dir),
        rows,
        sft_params(learning_rate=1e-12),
        max_tokens_per_microbatch=max_tokens_per_microbatch,
        seed=3,
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    expected = []
    for step in steps_of(rows, 3):
        losses = []
        for row in step:
            for completion in row.completions:
                logits = plain(input_ids=torch.tensor([row.prompt + completion])).logits[0]
                targets = torch.tensor(completion)
                predicted = logits[len(row.prompt) - 1 : -1]
                losses += torch.nn.functional.cross_entropy(predicted, targets, reduction="none").tolist()
        expected.append(sum(losses) / len(losses))
    assert [entry["loss"] for entry in log] == pytest.approx(expected, rel=1e-5)
    assert not METRICS & log[0].keys()


def test_sft_learns_the_completions(tiny_model_dir, rows):
    log = train_sft(
        load_model(tiny_model_dir),
        rows,
        sft_params(epochs=4, learning_rate=1e-2),
        max_tokens_per_microbatch=500,
        seed=3,
    )
    assert log[-1]["loss"] < log[0]["loss"] - 0.5


def test_a_saved_policy_has_the_log_probs_of_the_trained_model(tiny_model_dir, tmp_path, rows, reference):
    model, tokenizer = load_model(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)
    train_dpo(model, rows, reference, dpo_params(), trial(), max_tokens_per_microbatch=500)
    save_checkpoint(model, tokenizer, tmp_path / "policy", {"seed": 3})
    again = load_model(tmp_path / "policy")
    assert torch.equal(sequence_logps(again, rows, 500), sequence_logps(model, rows, 500))
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == tokenizer.chat_template


def test_gradient_checkpointing_changes_nothing(tiny_model_dir, rows, reference):
    plain, plain_weights = run_dpo(tiny_model_dir, rows, reference)
    log, weights = run_dpo(tiny_model_dir, rows, reference, gradient_checkpointing=True)
    assert log == plain
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_cached_reference_equals_one_computed_during_training(
    tiny_model_dir, rows, reference, lora, monkeypatch
):
    logs = {}
    for mode in ("cached", "online"):
        model = load_model(tiny_model_dir)
        if mode == "online":
            online = online_reference(model, lora=lora is not None)
            monkeypatch.setattr("dpo.training.train.cached_reference", lambda *_, online=online: online)
        logs[mode] = train_dpo(
            model, rows, reference, dpo_params(lora=lora), trial(learning_rate=1e-2),
            max_tokens_per_microbatch=500,
        )  # fmt: skip
    assert logs["cached"][-1]["rewards/margins"] > 0.1
    for name in ("loss", *METRICS):
        online, cached = ([entry[name] for entry in logs[mode]] for mode in ("online", "cached"))
        assert online == pytest.approx(cached, rel=1e-5, abs=1e-5), name


def test_lora_trains_and_saves_only_the_adapter(tiny_model_dir, tmp_path, rows, reference):
    model, tokenizer = load_model(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    point = trial(learning_rate=1e-2)
    train_dpo(model, rows, reference, dpo_params(lora=LORA), point, max_tokens_per_microbatch=500)
    after = model.model.state_dict()
    assert all(
        torch.equal(weight, after[name.replace("proj.", "proj.base_layer.")]) for name, weight in before.items()
    )
    for folder in ("once", "twice"):
        save_checkpoint(model, tokenizer, tmp_path / folder, {"seed": 3})
    assert not (tmp_path / "once/model.safetensors").exists()
    trained = {name.replace(".default", "") for name, p in model.model.named_parameters() if p.requires_grad}
    saved = load_file(tmp_path / "once/adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in saved} == trained
    config = json.loads((tmp_path / "once/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model_dir)
    assert config["target_modules"] == sorted(config["target_modules"])
    ours = sequence_logps(model, rows, 500)
    assert torch.equal(sequence_logps(load_model(tmp_path / "once"), rows, 500), ours)
    assert (ours - torch.tensor([reference[row.id] for row in rows])).abs().max() > 0.1


def test_initial_adapters_depend_only_on_the_seed(tiny_model_dir, rows, reference):
    logs = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(state)
        logs.append(run_dpo(tiny_model_dir, rows, reference, lora=LORA, seed=seed, pairs_per_step=18)[0])
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("kind", ["all weights", "lora"])
def test_8_bit_optimizers_train_like_adamw(kind, tmp_path, tiny_model_dir):
    folder = make_model("llama", tmp_path, hidden_size=64, intermediate_size=96, vocab_size=320)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    rows = make_rows(folder, 18)
    reference, lora = make_reference(folder, rows), LoraSettings(rank=64, alpha=64) if kind == "lora" else None
    logs = [
        run_dpo(folder, rows, reference, optimizer=optimizer, epochs=3, lora=lora)[0]
        for optimizer in ("adamw", "adamw_8bit")
    ]
    (_, *exact), (_, *ours) = ([entry["loss"] for entry in log] for log in logs)
    assert ours == pytest.approx(exact, rel=0.05)
    assert ours != exact, "states have 8 bits"


def test_an_8_bit_optimizer_on_an_unsupported_device_is_an_input_error(
    tiny_model_dir, rows, reference, monkeypatch
):
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cuda"})
    with pytest.raises(InputError, match="'adamw_8bit' does not support the device 'cpu'; choose adamw"):
        run_dpo(tiny_model_dir, rows, reference, optimizer="adamw_8bit")


def test_bf16_starts_at_margin_zero_with_a_bf16_cache_and_learns(tiny_model_dir, rows):
    model = load_model(tiny_model_dir, "bf16")
    table = sequence_logps(model, rows, 1000).tolist()
    cached = {row.id: tuple(logps) for row, logps in zip(rows, table, strict=True)}
    log = train_dpo(model, rows, cached, dpo_params(epochs=3), trial(), max_tokens_per_microbatch=100)
    assert log[0]["rewards/margins"] == log[0]["rewards/chosen"] == 0.0
    assert log[-1]["loss"] < math.log(2) - 0.05
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_diverging_policy_raises_an_alarm_with_step_and_margin(tiny_model_dir, rows, reference, caplog):
    run_dpo(tiny_model_dir, rows, reference)
    assert "diverges" not in caplog.text
    run_dpo(tiny_model_dir, rows, reference, learning_rate=1.0)
    assert re.search(r"step \d+: the policy diverges from its reference: .* nats, .* margin .*, loss", caplog.text)


@pytest.mark.parametrize("loss", every_loss(n for n in LOSSES if "reference" in LOSSES[n].needs))
def test_the_alarm_counts_nats_per_completion_with_every_loss(tiny_model_dir, rows, reference, loss, caplog):
    moved = {name: (chosen - 101.0, rejected) for name, (chosen, rejected) in reference.items()}
    run_dpo(tiny_model_dir, rows, moved, learning_rate=1e-12, loss=loss, beta=2.0)
    assert "log-probs of chosen moved by 101 nats, of rejected by 0" in caplog.text


def test_the_first_step_of_a_warm_up_changes_the_weights(tiny_model_dir, rows, reference):
    log, _ = run_dpo(tiny_model_dir, rows, reference, schedule="constant", warmup_ratio=0.4)
    assert [entry["learning_rate"] for entry in log] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])
    before = load_model(tiny_model_dir).model.state_dict()
    _, weights = run_dpo(tiny_model_dir, rows[:4], reference, warmup_ratio=0.9, learning_rate=1e-2)
    assert any(not torch.equal(weights[name], before[name]) for name in before)


def test_a_non_finite_loss_stops_training_with_step_and_pairs(tiny_model_dir, rows, reference):
    broken = reference | {"pair 5": (math.nan, 0.0)}
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is nan, .*pair 5\b"):
        run_dpo(tiny_model_dir, rows, broken)
