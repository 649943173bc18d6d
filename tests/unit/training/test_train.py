"""Training: its start, invariances, metrics, and equality with TRL's DPOTrainer step by step."""

import dataclasses
import json
import math
import re

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.reference_cache import cache_key, load_reference, shard_table, write_cache
from dpo.engine.token_table import TokenTable
from dpo.engine.tokenization import TokenRow, encode_pairs
from dpo.training.callbacks import Callback
from dpo.training.losses import Conservative, LdDpo, PairBatch, Robust, Sigmoid, Wpo, check_agreement
from dpo.training.losses.base import WITH_REFERENCE
from dpo.training.sampler import StepSampler
from dpo.training.settings import EarlyStopSettings, LoraSettings
from dpo.training.train import _hold_out, save_checkpoint, train_dpo, train_sft
from tests.support.models import make_model, plain_tokenizer
from tests.support.training import (
    LORA,
    LOSSES,
    PARAMS,
    POINT,
    Centered,
    dpo_params,
    every_loss,
    make_pairs,
    make_reference,
    make_rows,
    online_reference,
    sft_params,
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


def run_dpo(folder, rows, reference, max_tokens_per_microbatch=10_000, **changes):
    model = load_model(folder)
    point = trial(**{name: changes.pop(name) for name in POINT & changes.keys()})
    log = train_dpo(
        model,
        rows,
        reference,
        dpo_params(**changes),
        point,
        max_tokens_per_microbatch=max_tokens_per_microbatch,
    )
    return log, {name: weight.detach().clone() for name, weight in model.model.state_dict().items()}


def steps_of(rows, seed, pairs_per_step=4, epochs=1):
    """The rows of each optimizer step, with one micro-batch per step."""
    sampler = StepSampler(
        [row.tokens for row in rows],
        rows_per_step=pairs_per_step,
        max_tokens_per_microbatch=10**6,
        epochs=epochs,
        seed=seed,
    )
    return [[rows[i] for i in batch] for epoch in range(epochs) for (batch,) in sampler.steps(epoch)]


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


def test_a_loss_with_step_wide_statistics_does_not_depend_on_micro_batches(tiny_model_dir, rows, reference):
    seen = []

    class Recorded(Centered):
        def statistics(self, step, beta):
            seen.append(len(step.policy))
            return super().statistics(step, beta)

    early_stop = EarlyStopSettings(validation_share=0.3, every_steps=1, patience=9)
    changes = {"loss": Recorded(), "learning_rate": 1e-4, "early_stop": early_stop}
    expected, expected_weights = run_dpo(tiny_model_dir, rows, reference, **changes)
    training, validation = (len(part) for part in _hold_out(TokenTable.of(rows), 0.3))
    sizes = [size for step in range(0, training, 4) for size in (min(4, training - step), validation)]
    assert seen == sizes
    for max_tokens_per_microbatch in (160, 1):
        log, weights = run_dpo(
            tiny_model_dir, rows, reference, max_tokens_per_microbatch=max_tokens_per_microbatch, **changes
        )
        for name in ("loss", "grad_norm", "eval_loss"):
            assert [e[name] for e in log] == pytest.approx([e[name] for e in expected], rel=1e-4, abs=1e-4), name
        for name, weight in expected_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5)
    assert seen == sizes * 3


def test_a_loss_gets_log_probs_per_token_if_it_needs_them(tiny_model_dir, rows, reference):
    class PerToken(Sigmoid):
        needs = WITH_REFERENCE | {"token_logps"}

        def _forward(self, pairs, beta):
            parts = pairs.token_logps.split(pairs.lengths.flatten().tolist())
            policy = torch.stack([part.sum() for part in parts]).view(-1, 2)
            return super()._forward(PairBatch(policy, pairs.reference, pairs.lengths), beta)

    expected, _ = run_dpo(tiny_model_dir, rows, reference, 100)
    log, _ = run_dpo(tiny_model_dir, rows, reference, 100, loss=PerToken())
    for ours, theirs in zip(log, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_a_loss_without_reference_trains_without_reference_log_probs(tiny_model_dir, rows, reference):
    class NoReference(Sigmoid):
        needs = frozenset()

    log, _ = run_dpo(tiny_model_dir, rows, {}, loss=NoReference(), pairs_per_step=18, beta=0.5)
    logps = torch.tensor([reference[row.id] for row in rows])
    expected = Sigmoid()(PairBatch(logps, torch.zeros(18, 2), torch.ones(18, 2)), 0.5).mean().item()
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert log[0]["rewards/chosen"] == pytest.approx(0.5 * log[0]["logps/chosen"])
    assert not {"logratios/chosen", "logratios/rejected"} & log[0].keys()


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


class OrderedDPOTrainer(DPOTrainer):
    """TRL's trainer with an unshuffled dataset and our warm-up."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        def factor(step):
            warmup = self.args.warmup_steps
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if self.args.lr_scheduler_type == "constant":
                return 1.0
            return (num_training_steps - step) / (num_training_steps - warmup)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(dataset or self.train_dataset)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1.0},
        {"optimizer": "rmsprop", "schedule": "linear", "warmup_ratio": 0.3, "max_grad_norm": 10.0},
    ],
)
def test_ten_steps_equal_those_of_trl(tiny_model_dir, tmp_path, changes):
    beta, seed = 0.3, 5
    tokenizer = plain_tokenizer()
    pairs = make_pairs(40)
    rows = encode_pairs(pairs, tokenizer, 400)
    model = load_model(tiny_model_dir)
    table = sequence_logps(model, rows, 1000).tolist()
    reference = {row.id: tuple(logps) for row, logps in zip(rows, table, strict=True)}
    params, point = dpo_params(**changes), trial(beta, 3e-4, seed)
    ours = train_dpo(model, rows, reference, params, point, max_tokens_per_microbatch=100)

    by_id = {pair["id"]: pair for pair in pairs}
    order = [by_id[row.id] for step in steps_of(rows, seed) for row in step]
    trainer = OrderedDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=beta,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            learning_rate=point.learning_rate,
            optim={"adamw": "adamw_torch", "rmsprop": "rmsprop"}[params.optimizer],
            lr_scheduler_type=params.schedule,
            warmup_steps=round(10 * params.warmup_ratio),
            max_grad_norm=params.max_grad_norm,
            weight_decay=0.0,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([{k: v for k, v in p.items() if k != "id"} for p in order]),
        processing_class=tokenizer,
    )
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == len(ours) == 10
    assert abs(ours[-1]["rewards/margins"]) > 0.1
    for name in ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "learning_rate"):
        assert [e[name] for e in ours] == pytest.approx([e[name] for e in theirs], rel=1e-4, abs=1e-4), name
    for (name, weight), trained in zip(model.model.named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(weight, trained, rtol=0, atol=1e-4, msg=name)


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


def test_early_stop_ends_after_its_patience_and_keeps_the_best_weights(tiny_model_dir, rows, reference):
    # Validation pairs prefer the other completion, so training increases their loss from the first step on.
    _, held_out = _hold_out(TokenTable.of(rows), 0.3)
    flipped = {row.id: dataclasses.replace(row, completions=row.completions[::-1]) for row in held_out}
    rows = [flipped.get(row.id, row) for row in rows]
    reference = {key: value[::-1] if key in flipped else value for key, value in reference.items()}
    early_stop = EarlyStopSettings(validation_share=0.3, every_steps=1, patience=2)
    model = load_model(tiny_model_dir)
    params = dpo_params(early_stop=early_stop, epochs=9)
    log = train_dpo(model, rows, reference, params, trial(), max_tokens_per_microbatch=500)
    validation = [entry["eval_loss"] for entry in log]
    assert validation == sorted(validation)
    assert len(log) == 1 + 2
    policy = sequence_logps(model, list(flipped.values()), 500)
    cached = torch.tensor([reference[name] for name in flipped])
    losses = Sigmoid()(PairBatch(policy, cached, torch.ones_like(policy)), 0.1)
    assert losses.mean().item() == pytest.approx(validation[0], rel=1e-6)
    assert validation[1] > validation[0] * 1.001


def test_early_stop_without_validation_pairs_is_an_input_error(tiny_model_dir, rows, reference):
    early_stop = EarlyStopSettings(validation_share=1e-6, every_steps=1, patience=1)
    with pytest.raises(InputError, match=r"validation_share 1e-06 of 18 pairs leaves no pairs to validate on"):
        run_dpo(tiny_model_dir, rows, reference, early_stop=early_stop)


def test_validation_pairs_share_no_prompt_with_training_pairs():
    rows = [TokenRow(str(i), (i % 20,), ((1,), (2,))) for i in range(200)]
    kept, held_out = (
        [rows[int(name)].prompt for name in part.ids] for part in _hold_out(TokenTable.of(rows), 0.3)
    )
    assert len(kept) + len(held_out) == 200
    assert not set(kept) & set(held_out)


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


AVERAGED = {"length_normalised", "simpo", "orpo", "sft"}
"""Losses whose implicit rewards are averaged over tokens."""


@pytest.mark.parametrize("loss", every_loss())
def test_every_loss_raises_the_margin(tiny_model_dir, rows, reference, loss):
    log, _ = run_dpo(tiny_model_dir, rows, reference, loss=loss, learning_rate=3e-3, epochs=3)
    if "reference" in LOSSES[loss].needs:
        assert log[0]["rewards/margins"] == 0.0
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 0.05 * (0.1 if loss in AVERAGED else 1)
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("loss", every_loss())
def test_no_loss_depends_on_micro_batches(tiny_model_dir, rows, reference, loss):
    changes = {"loss": loss, "learning_rate": 1e-4, "epochs": 2}
    expected, expected_weights = run_dpo(tiny_model_dir, rows, reference, **changes)
    log, weights = run_dpo(tiny_model_dir, rows, reference, max_tokens_per_microbatch=1, **changes)
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert [e[name] for e in log] == pytest.approx([e[name] for e in expected], rel=1e-3, abs=1e-4), name
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5)


def test_the_weight_of_a_pair_multiplies_its_loss(tiny_model_dir, rows, reference):
    weights = {row.id: 0.25 * i for i, row in enumerate(rows[:9], 1)}
    shifted = {name: (chosen - 3, rejected) for name, (chosen, rejected) in reference.items()}
    loss = math.log1p(math.exp(-0.3))
    for max_tokens_per_microbatch in (60, 10_000):
        log = train_dpo(
            load_model(tiny_model_dir), rows, shifted, dpo_params(), trial(learning_rate=1e-12), weights=weights,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
        )  # fmt: skip
        expected = [loss * sum(weights.get(r.id, 1) for r in step) / len(step) for step in steps_of(rows, 3)]
        assert [entry["loss"] for entry in log] == pytest.approx(expected, rel=1e-5)


def test_weights_of_one_change_nothing(tiny_model_dir, rows, reference):
    plain, weights = run_dpo(tiny_model_dir, rows, reference)
    model = load_model(tiny_model_dir)
    ones = {row.id: 1.0 for row in rows}
    log = train_dpo(
        model, rows, reference, dpo_params(), trial(), weights=ones, max_tokens_per_microbatch=10_000
    )  # fmt: skip
    assert log == plain
    assert all(torch.equal(weight, weights[name]) for name, weight in model.model.state_dict().items())


def test_label_smoothing_can_be_the_agreement_of_each_pair(tiny_model_dir, rows, reference):
    agreement = {row.id: 0.5 + i / 20 for i, row in enumerate(rows[:9])}
    shifted = {name: (chosen - 30, rejected) for name, (chosen, rejected) in reference.items()}
    log = train_dpo(
        load_model(tiny_model_dir), rows, shifted, dpo_params(), max_tokens_per_microbatch=60, agreement=agreement,
        trial=trial(learning_rate=1e-12, loss=Conservative(label_smoothing="agreement")),
    )  # fmt: skip
    right, wrong = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    expected = []
    for step in steps_of(rows, 3):
        shares = [agreement.get(row.id, 1.0) for row in step]
        expected.append(sum(share * right + (1 - share) * wrong for share in shares) / len(step))
    assert [entry["loss"] for entry in log] == pytest.approx(expected, rel=1e-4)


def test_label_smoothing_by_agreement_without_any_is_an_input_error(tiny_model_dir, rows, reference):
    for loss in (Conservative(label_smoothing="agreement"), Robust(label_smoothing="agreement")):
        with pytest.raises(
            InputError, match=rf"losses\.{loss.name}\.label_smoothing: agreement: no pair has an agreement"
        ):
            run_dpo(tiny_model_dir, rows, reference, loss=loss)


def test_robust_needs_a_majority_for_chosen():
    check_agreement([Conservative(label_smoothing="agreement"), Robust(), Sigmoid()], {"a": 0.5, "b": 0.0})
    check_agreement([Robust(label_smoothing="agreement")], {"a": 0.51, "b": 1.0})
    with pytest.raises(
        InputError, match=r"robust needs agreements above 0\.5, but those of 2 pairs .* 0\.5 of 'b'"
    ):
        check_agreement([Robust(label_smoothing="agreement")], {"a": 0.51, "b": 0.5, "c": 0.2})


def test_values_per_token_are_those_of_the_plain_model(tiny_model_dir, rows, reference):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    weights = []
    for row in rows:
        weight = 0.0
        for completion in row.completions:
            logits = plain(input_ids=torch.tensor([row.prompt + completion])).logits[0, len(row.prompt) - 1 : -1]
            table = logits.detach().double().log_softmax(1)
            logps = table.gather(1, torch.tensor(completion)[:, None])[:, 0]
            weight += (logps - table.exp().square().sum(1).log()).mean().item()
        weights.append(math.exp(weight))
    change = {"pairs_per_step": 18, "learning_rate": 1e-12}
    log, _ = run_dpo(tiny_model_dir, rows, reference, loss=Wpo(), **change)
    assert log[0]["loss"] == pytest.approx(math.log(2) * sum(weights) / 18, rel=1e-4)
    log, _ = run_dpo(tiny_model_dir, rows, reference, loss=LdDpo(alpha=0.0), **change)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the reference is the model before training"
