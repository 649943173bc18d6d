"""Training in rounds: which pairs are made, and that an interrupted run reaches the same policy and files."""

import dataclasses
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import dpo.online.dpo_rounds as dpo_module
import dpo.online.rounds as module
from dpo.common.errors import InputError
from dpo.common.files import sha256
from dpo.config import load_params
from dpo.data.schema import PAIRS_SCHEMA
from dpo.engine.logprobs import load_model
from dpo.evaluation.judges import load_judge
from dpo.evaluation.settings import ScorerSettings
from dpo.online.dpo_rounds import DpoRounds
from dpo.online.pairs import check_pairs, ranked_pairs, score_responses
from dpo.online.rounds import drawn_prompts, save_rounds
from dpo.online.settings import OnlineSettings
from dpo.training.checkpoints import CheckpointStore
from dpo.training.loop import TrainingLoop
from dpo.training.train import train_dpo
from tests.support.models import chat_tokenizer, make_model
from tests.support.training import PARAMS, dpo_params, killed_at_call, make_pairs, make_reference, trial


def count_e(prompts, responses):
    """Score responses by the number of letters e."""
    return [float(response.count("e")) for response in responses]


def constant(prompts, responses):
    """Score all responses equally."""
    return [0.0] * len(responses)


def answers(scores, finished=None):
    """Answers of two to each prompt."""
    count = len(scores)
    return pd.DataFrame(
        {
            "number": [place // 3 for place in range(count)],
            "prompt_ids": [[1, 2]] * count,
            "response": [f"text {place}" for place in range(count)],
            "ids": [[place, 9] for place in range(count)],
            "finished": finished or [True] * count,
            "score": scores,
        }
    )


PROMPTS = [{"prompt": "a"}, {"prompt": "b", "turns": None}]


def test_the_best_and_the_worst_response_are_a_pair_and_ties_are_none():
    pairs, rows = ranked_pairs(PROMPTS, answers([0.0, 2.0, 1.0, 3.0, 3.0, 3.0]), "round-1")
    (pair,), (row,) = pairs, rows
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("a", "text 1", "text 0")
    assert (pair["chosen_rating"], pair["rejected_rating"], pair["id"]) == (2.0, 0.0, row.id)
    assert row.completions == ((1, 9), (0, 9))


def test_truncated_responses_are_in_no_pair():
    finished = [True, False, True, False, False, True]
    pairs, _ = ranked_pairs(PROMPTS, answers([0.0, 2.0, 1.0, 1.0, 2.0, 3.0], finished), "round-1")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("text 2", "text 0")]


def test_a_judge_that_only_compares_ranks_by_its_mean_verdict():
    class Longer:
        def score(self, prompts, responses):
            return None

        def compare(self, prompts, responses, others, other_scores=None):
            wins = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in zip(responses, others, strict=True)]
            return pd.DataFrame({"win": wins})

    texts = ["a", "aaa", "aa", "bb", "b", "bb"]
    assert score_responses(Longer(), ["p"] * 3 + ["q"] * 3, texts, 3) == [0.0, 1.0, 0.5, 0.75, 0.0, 0.75]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    tokenizer = chat_tokenizer()
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder, vocab_size=len(tokenizer), initializer_range=0.05)
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = list(range(40, 80))  # responses end soon
    settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXT_RULES = ("mojibake", "control_characters", "special_tokens", "rendered_text")
CONTRACT = dataclasses.replace(PARAMS.validate, rules=dict.fromkeys(TEXT_RULES, "warn"))
"""A random model writes such text."""


def make_rounds(model, folder, *, rounds=2, minutes=0, function="count_e", **online):
    settings = ScorerSettings(kind="scorer", function=f"tests.unit.online.test_rounds:{function}")
    return DpoRounds(
        model, folder / "work", load_judge(settings, "feedback"),
        dataclasses.replace(trial(learning_rate=1e-2), method="online", rounds=rounds),
        OnlineSettings(**{"prompts": None, "answers": 3, **online}),
        dpo_params(pairs_per_step=2, schedule="cosine"), PARAMS.engine, CONTRACT,
        {"max_new_tokens": 40, "max_prompt_tokens": 100, "max_tokens_per_batch": 4000, "seed": 0},
        folder / "benchmarks", CheckpointStore(folder / "steps", minutes),
    )  # fmt: skip


def train(model, folder, **options):
    rounds = make_rounds(model, folder, **options)
    outcome = rounds.run(make_pairs(8))
    save_rounds(rounds.work, folder / "rounds")
    return outcome.policy, outcome.log, outcome.counts


def contents(folder, policy):
    files = sorted(path.relative_to(folder) for path in (folder / "rounds").rglob("*") if path.is_file())
    return {str(file): sha256(folder / file) for file in files}, sha256(policy / "model.safetensors")


@pytest.fixture(scope="module")
def finished(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    policy, log, counts = train(reference, folder)
    return folder, policy, log, counts


def test_rounds_share_prompts_and_steps_and_carry_the_schedule_on(finished):
    folder, _, log, counts = finished
    assert [each["prompts"] for each in counts] == [4, 4]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert [entry["round"] for entry in log] == [1, 1, 2, 2]
    rates = [entry["learning_rate"] for entry in log]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 4
    files = {path.name for path in (folder / "rounds/round-2").rglob("*")}
    assert files == {
        *("answers.parquet", "pairs.parquet", "quarantine.parquet", "counts.json", "reference"),
        *("logps.arrow", "manifest.json"),
    }


def test_the_optimizer_state_is_carried_on_and_earlier_states_are_deleted(finished):
    folder = finished[0]
    state = torch.load(folder / "work/optimizer-2.pt", weights_only=True)["state"]
    assert state[0]["step"].item() == 4
    assert {path.name for path in (folder / "work").glob("*-[12]*")} >= {"policy-2", "round-1.json"}
    assert not {"policy-1", "optimizer-1.pt"} & {path.name for path in (folder / "work").iterdir()}


def test_the_reference_log_probs_are_those_of_the_sampled_ids(finished, reference):
    folder = finished[0]
    logps = Dataset.from_file(str(folder / "rounds/round-2/reference/logps.arrow")).to_pandas().set_index("id")
    table = pd.read_parquet(folder / "rounds/round-2/answers.parquet")
    pair = pd.read_parquet(folder / "rounds/round-2/pairs.parquet").iloc[0]
    chosen = table[table["response"] == pair["chosen"]].iloc[0]
    model = AutoModelForCausalLM.from_pretrained(reference).eval()
    ids = torch.tensor([[*chosen["prompt_ids"], *chosen["ids"]]])
    with torch.no_grad():
        scores = model(ids).logits[0].log_softmax(1)
    start = len(chosen["prompt_ids"])
    own = scores[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().item()
    assert logps.loc[pair["id"], "chosen"] == pytest.approx(own, abs=1e-3)


def test_prompts_of_a_training_table_become_valid_pairs(reference, tmp_path):
    """A Parquet file that pandas reads has NaN for null texts, and arrays for turns."""
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
              {"role": "user", "content": "Tell"}], None, None]  # fmt: skip
    columns = {name: [None] * 3 for name in PAIRS_SCHEMA.names} | {"prompt": ["a", "b", "b"], "turns": turns}
    pq.write_table(pa.table(columns, PAIRS_SCHEMA), tmp_path / "train.parquet")
    prompts = drawn_prompts(pd.read_parquet(tmp_path / "train.parquet"), OnlineSettings(prompts=9), 0)
    assert sorted(prompt["prompt"] for prompt in prompts) == ["a", "b"]
    pairs, _ = ranked_pairs(prompts, answers([0.0, 2.0, 1.0, 3.0, 1.0, 2.0]), "round-1")
    check_pairs(pairs, tmp_path, CONTRACT, tokenizer=reference, max_length=200, benchmarks=tmp_path / "benchmarks")
    written = {row["prompt"]: row for row in pq.read_table(tmp_path / "pairs.parquet").to_pylist()}
    assert [turn["content"] for turn in written["a"]["turns"]] == ["Hi", "Yes?", "Tell"]
    assert (written["b"]["turns"], written["b"]["tools"]) == (None, None)


KILLS = {
    "before the answers of a round": (module, "response_table", 2),
    "before the reference log-probs": (dpo_module, "compute_reference", 2),
    "within the training of a round": (TrainingLoop, "_train_step", 4),
    "before the policy of a round is saved": (module, "save_checkpoint", 1),
    "after the policy of a round is saved": (DpoRounds, "_rows", 2),
}


@pytest.mark.parametrize(
    "place", [pytest.param(each, marks=() if "training" in each else pytest.mark.slow) for each in KILLS]
)
def test_a_killed_run_reaches_the_same_files(reference, finished, tmp_path, monkeypatch, place):
    with killed_at_call(monkeypatch, *KILLS[place]):
        train(reference, tmp_path)
    policy, log, counts = train(reference, tmp_path)
    assert contents(tmp_path, policy) == contents(*finished[:2])
    assert (log, counts) == (finished[2], finished[3])


@pytest.mark.slow
def test_a_moving_reference_is_the_policy_of_the_round_before(reference, tmp_path):
    _, log, _ = train(reference, tmp_path, reference="moving")
    assert log[2]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(log[1]["rewards/margins"]) > 1e-4


def test_rounds_with_sharded_weights_are_refused_before_they_sample(reference, tmp_path, monkeypatch):
    monkeypatch.setattr("dpo.online.rounds.shards_weights", lambda: True)
    with pytest.raises(InputError, match="rounds do not work with sharded weights"):
        make_rounds(reference, tmp_path).run([])


def test_rounds_without_a_step_and_without_a_pair_are_errors(reference, tmp_path):
    with pytest.raises(InputError, match=r"sweep.rounds: 5 rounds of 4 steps.*raise online.prompts"):
        train(reference, tmp_path / "a", rounds=5)
    with pytest.raises(InputError, match="no round has a pair"):
        train(reference, tmp_path / "b", function="constant")


def test_one_round_equals_training_on_the_same_pairs(reference, tmp_path):
    policy, log, _ = train(reference, tmp_path, rounds=1)
    rounds = make_rounds(reference, tmp_path, rounds=1)
    rows = rounds._rows(tmp_path / "work/round-1", make_pairs(8))
    assert len(rows) in (3, 4)  # two passes over the pairs have all 4 steps
    model, budget = load_model(reference), PARAMS.engine.max_tokens_per_microbatch
    params, logps = dpo_params(epochs=2, pairs_per_step=2, schedule="cosine"), make_reference(reference, rows)
    offline = train_dpo(model, rows, logps, params, trial(learning_rate=1e-2), max_tokens_per_microbatch=budget)
    assert [entry["loss"] for entry in offline] == [entry["loss"] for entry in log]
    saved = load_file(policy / "model.safetensors")
    assert all(torch.equal(dict(model.model.named_parameters())[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": "[1]"}, "feedback: null, but sweep.rounds needs a judge"),
        ({"rounds": "[1]", "same": True}, "feedback: vader_compound|dpo.evaluation"),
        ({"rounds": "[200]", "same": True}, "online.prompts: 160 leaves a round without a prompt"),
    ],
)
def test_settings_of_rounds_are_checked(tmp_path, changes, words):
    text = (Path(__file__).parents[3] / "params.yaml").read_text()
    text = text.replace("rounds: []", f"rounds: {changes['rounds']}")
    if changes.get("same"):
        judge = "{kind: scorer, function: 'dpo.evaluation.judges.scorer:vader_compound'}"
        text = text.replace("feedback: null", f"feedback: {judge}")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        load_params(tmp_path / "params.yaml")
