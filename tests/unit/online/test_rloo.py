"""RLOO: loss and gradient against TRL, advantages by hand, rounds that resume to the same files."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import dpo.online.rloo_rounds as module
from dpo.common.files import sha256
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.packing import pack
from dpo.engine.tokenization import TokenRow
from dpo.evaluation.judges import load_judge
from dpo.evaluation.settings import ScorerSettings
from dpo.online.rloo_rounds import RlooRounds, advantages, rewarded
from dpo.online.rounds import answer_rows, save_rounds
from dpo.online.settings import OnlineSettings
from dpo.training.checkpoints import CheckpointStore
from dpo.training.loop import TrainingLoop
from dpo.training.objectives import Answers, RlooObjective
from dpo.training.train import train_rloo
from tests.support.launch import ROOT, start
from tests.support.models import chat_tokenizer, make_model
from tests.support.training import LORA, PARAMS, dpo_params, killed_at_call, make_pairs, trial

ROWS = [
    TokenRow("a", (3, 4, 5), ((6, 7, 8), (9, 2), (10, 11, 12, 2))),
    TokenRow("b", (13, 14), ((15, 2), (16, 17, 18), (19, 2))),
]
OFFSETS = torch.tensor([[0.0, 0.3, -0.4], [0.1, -0.05, 0.25]])
"""Of the log-probs from those of the policy that sampled: some ratios are beyond the clip."""


def values(model, rows, offsets, rewards):
    old = (sequence_logps(model, rows, 1000) + offsets).tolist()
    by_row = zip(rows, old, advantages(rewards, "leave_one_out").tolist(), strict=True)
    return {row.id: Answers([0.0] * len(each), each, each, own) for row, each, own in by_row}


@pytest.mark.parametrize("offsets", [torch.zeros(2, 3), OFFSETS])
def test_loss_and_gradient_equal_those_of_trl(tmp_path, offsets):
    trl = pytest.importorskip("trl", reason="TRL is not installed (extra `rl`)")
    folder = make_model("llama", tmp_path)
    rewards = [[1.0, 0.0, 0.25], [-1.0, 2.0, 0.5]]
    ours = load_model(folder)
    answers = values(ours, ROWS, offsets, rewards)
    loss, metrics = RlooObjective(answers, 0.2)(ours, pack(ROWS))
    (loss / len(ROWS)).backward()

    trainer = trl_trainer(trl, folder, tmp_path / "trl")
    theirs = trainer.model.train()
    prompts = [row.prompt for row in ROWS for _ in row.completions]
    completions = [ids for row in ROWS for ids in row.completions]
    width, longest = max(map(len, prompts)), max(map(len, completions))
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([list(ids) + [0] * (longest - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in completions]),
        "old_logps": torch.tensor([value for row in ROWS for value in answers[row.id].policy_logps]),
        "advantages": torch.tensor([value for row in ROWS for value in answers[row.id].advantages]),
    }
    expected = trainer._compute_loss(theirs, inputs)
    expected.backward()
    assert loss.item() / len(ROWS) == pytest.approx(expected.item(), abs=1e-5)
    for (name, own), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(
            own.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert (metrics["clip_ratio"].item() > 0) == bool(offsets.any())


def trl_trainer(trl, folder, output):
    """Return TRL's trainer of a model without a KL penalty."""
    from datasets import Dataset

    config = trl.RLOOConfig(
        output_dir=str(output), per_device_train_batch_size=6, num_generations=3, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", beta=0.0, epsilon=0.2, max_completion_length=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return trl.RLOOTrainer(
        model=model, args=config, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 6}), processing_class=chat_tokenizer(),
    )  # fmt: skip


def test_advantages_by_hand():
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    third = 1 / 3
    np.testing.assert_allclose(advantages(rewards, "leave_one_out"), [[1, -third, -third, -third], [0] * 4])
    group = advantages(rewards, "group")
    np.testing.assert_allclose(group[0], np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))
    np.testing.assert_allclose(group[1], 0)


def test_a_truncated_answer_has_the_lowest_score():
    table = pd.DataFrame({"score": [3.0, 2.0, 1.0], "finished": [False, True, True]})
    assert rewarded(table).tolist() == [1.0, 2.0, 1.0]


def test_rows_have_all_answers_as_the_ids_that_were_sampled():
    table = pd.DataFrame({"number": [0, 0, 1], "prompt_ids": [[1], [1], [2, 3]], "ids": [[4, 5], [6], [7]]})
    assert answer_rows(table, "round-1") == [
        TokenRow("round-1-0", (1,), ((4, 5), (6,))),
        TokenRow("round-1-1", (2, 3), ((7,),)),
    ]


def short(prompts, responses):
    """Score short responses higher."""
    return [-float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    tokenizer = chat_tokenizer()
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder, vocab_size=len(tokenizer), initializer_range=0.05)
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = list(range(40, 80))
    settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model, folder, *, rounds=2, minutes=0, lora=None, **online):
    judge = load_judge(ScorerSettings(kind="scorer", function="tests.unit.online.test_rloo:short"), "feedback")
    point = dataclasses.replace(trial(learning_rate=1e-2), method="rloo", rounds=rounds)
    own = RlooRounds(
        model, folder / "work", judge, point, OnlineSettings(**{"prompts": None, "answers": 4, **online}),
        dpo_params(pairs_per_step=2, lora=lora), PARAMS.engine, PARAMS.validate,
        {"max_new_tokens": 20, "max_prompt_tokens": 100, "max_tokens_per_batch": 4000, "seed": 0},
        folder / "benchmarks", CheckpointStore(folder / "steps", minutes),
    )  # fmt: skip
    outcome = own.run(make_pairs(8))
    save_rounds(own.work, folder / "rounds")
    return outcome


def contents(folder, policy):
    files = sorted(path.relative_to(folder) for path in (folder / "rounds").rglob("*") if path.is_file())
    return {str(file): sha256(folder / file) for file in files}, sha256(policy / "model.safetensors")


@pytest.fixture(scope="module")
def finished(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(reference, folder)


def test_rewards_are_scores_minus_beta_kl_at_the_policy_that_sampled(finished, reference):
    folder, outcome = finished
    first, second = (pd.read_parquet(folder / f"rounds/round-{n}/advantages.parquet") for n in (1, 2))
    assert (first["policy_logps"] == first["reference_logps"]).all()
    assert (second["policy_logps"] - second["reference_logps"]).abs().max() > 0.01
    rewards = second["scores"] - 0.1 * (second["policy_logps"] - second["reference_logps"])
    expected = advantages(rewards.to_numpy().reshape(-1, 4), "leave_one_out").flatten()
    np.testing.assert_allclose(second["advantages"], expected)
    rows = answer_rows(pd.read_parquet(folder / "rounds/round-2/answers.parquet"), "round-2")
    logps = sequence_logps(load_model(reference), rows, 1000).flatten()
    np.testing.assert_allclose(second["reference_logps"], logps, atol=1e-4)
    assert [entry["step"] for entry in outcome.log] == [1, 2, 3, 4]
    assert outcome.log[0]["clip_ratio"] == 0
    assert outcome.log[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert outcome.cost.sampled_tokens == sum(each["sampled_tokens"] for each in outcome.counts)
    tables = [pd.read_parquet(folder / f"rounds/round-{n}/answers.parquet") for n in (1, 2)]
    tokens = [sum(row.tokens for row in answer_rows(table, "")) for table in tables]
    assert outcome.cost.scored_tokens == tokens[0] + 2 * tokens[1]
    assert sum(entry["tokens"] for entry in outcome.log) == sum(tokens)


KILLS = {
    "before the advantages of a round": (module.RlooRounds, "_write_advantages", 2),
    "within the training of a round": (TrainingLoop, "_train_step", 4),
}


@pytest.mark.parametrize("place", KILLS)
def test_a_killed_run_reaches_the_same_files(reference, finished, tmp_path, monkeypatch, place):
    with killed_at_call(monkeypatch, *KILLS[place]):
        train(reference, tmp_path)
    outcome = train(reference, tmp_path)
    assert contents(tmp_path, outcome.policy) == contents(finished[0], finished[1].policy)
    assert (outcome.log, outcome.counts, outcome.cost) == (finished[1].log, finished[1].counts, finished[1].cost)


def test_rounds_with_adapters_start_at_the_reference_and_continue_the_adapters(reference, tmp_path):
    outcome = train(reference, tmp_path, lora=LORA)
    assert outcome.log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert (outcome.policy / "adapter_model.safetensors").is_file()
    first, second = (pd.read_parquet(tmp_path / f"rounds/round-{n}/advantages.parquet") for n in (1, 2))
    assert (first["policy_logps"] == first["reference_logps"]).all()
    assert (second["policy_logps"] - second["reference_logps"]).abs().max() > 1e-3
    policy, rows = (
        load_model(outcome.policy),
        answer_rows(pd.read_parquet(tmp_path / "rounds/round-2/answers.parquet"), "a"),
    )
    assert not torch.equal(
        sequence_logps(policy, rows, 1000).flatten(), torch.tensor(second["policy_logps"].to_numpy())
    )


@pytest.mark.slow
def test_two_processes_do_the_same_rounds_as_one(reference, finished, tmp_path):
    done = start(2, ROOT / "tests/support/launched_rounds.py", reference, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for number in (1, 2):
        ours, theirs = (folder / f"rounds/round-{number}" for folder in (tmp_path, finished[0]))
        ids, expected = (pd.read_parquet(folder / "answers.parquet")["ids"] for folder in (ours, theirs))
        assert list(map(list, ids)) == list(map(list, expected))
        tables = (pd.read_parquet(folder / "advantages.parquet") for folder in (ours, theirs))
        pd.testing.assert_frame_equal(*tables, atol=1e-4)


def test_training_raises_answers_with_a_positive_advantage_above_the_others(tmp_path):
    model = load_model(make_model("llama", tmp_path))
    answers = values(model, ROWS, torch.zeros(2, 3), [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    before = sequence_logps(model, ROWS, 1000)
    log = train_rloo(
        model, ROWS, answers, dpo_params(epochs=3), trial(), clip=0.2, max_tokens_per_microbatch=100
    )  # fmt: skip
    gained = sequence_logps(model, ROWS, 1000) - before
    assert gained[0, 0] > gained[0, 1:].max()
    assert gained[1, 2] > gained[1, :2].max()
    assert [entry["tokens"] for entry in log] == [sum(row.tokens for row in ROWS)] * 3
