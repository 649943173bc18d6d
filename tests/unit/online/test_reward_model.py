"""The reward model learns preferences, reads text as the judge does, and trains as feedback of its trial."""

import sys
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.evaluation.judges import load_judge
from dpo.evaluation.judges.reward_model import encoded
from dpo.evaluation.settings import RewardModelSettings
from dpo.online.reward_model import train_reward_model
from dpo.online.settings import RewardTrainingSettings
from tests.support.models import chat_tokenizer, make_model
from tests.support.project import ROOT
from tests.support.training import make_pairs


@pytest.fixture
def reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer()
    return make_model("llama", Path("models/reference"), vocab_size=len(tokenizer)), tokenizer


def train(reference, pairs, **settings):
    folder, tokenizer = reference
    params = RewardTrainingSettings(**{"pairs_per_step": 6, "learning_rate": 5e-3, **settings})
    return train_reward_model(folder, tokenizer, pd.DataFrame(pairs), params, precision="fp32", seed=3)


def test_it_learns_preferences_and_the_judge_reads_the_same_tokens(reference):
    pytest.importorskip("trl", reason="TRL is not installed (extra `rl`)")
    pairs = make_pairs(24)
    trained = train(reference, pairs, epochs=6)
    assert [round(entry["epoch"]) for entry in trained.log][-1] == 6
    assert trained.log[-1]["loss"] < trained.log[0]["loss"]
    tokenizer = reference[1]
    expected = [encoded(tokenizer, pair["prompt"], pair["chosen"], 128)["input_ids"] for pair in pairs]
    assert [list(row.prompt) for row in trained.rows[:24]] == expected

    trained.model.save_pretrained("models/rewards/3")
    tokenizer.save_pretrained("models/rewards/3")
    judge = load_judge(RewardModelSettings(kind="reward_model", model="models/rewards/3"), "feedback")
    texts = [[pair[name] for pair in pairs] for name in ("prompt", "chosen", "rejected")]
    assert judge.compare(*texts)["win"].mean() > 0.9


def test_labelled_rows_are_left_out_and_must_not_be_all(reference):
    pytest.importorskip("trl", reason="TRL is not installed (extra `rl`)")
    with pytest.raises(InputError, match="a reward model needs pairs, but all rows are labelled completions"):
        train(reference, [{**pair, "rejected": None} for pair in make_pairs(2)])


def test_missing_trl_is_an_error_that_names_the_fix(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(InputError, match=r"sweep.reward_models: a reward model needs TRL .*pip install 'trl"):
        train(reference, make_pairs(2))


def test_a_reward_model_of_the_sweep_may_not_evaluate(reference):
    Path("models/rewards/3").mkdir(parents=True)
    with pytest.raises(InputError, match=r"models/rewards/3 is outside models/own/"):
        load_judge(RewardModelSettings(kind="reward_model", model="models/rewards/3"), "evaluate.judges.0")


def settings(tmp_path, feedback, **sweep):
    values = YAML(typ="safe").load(ROOT / "params.yaml")
    values["feedback"] = feedback
    values["sweep"] |= {"rloo": [2], **sweep}
    YAML().dump(values, tmp_path / "params.yaml")
    return load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("seeds", "models", "expected"),
    [([17, 18], [5], ["5", "5"]), ([17, 18], [18, 17, 5], ["17", "18"])],
)
def test_a_trial_uses_the_reward_model_of_its_seed_or_the_only_one(tmp_path, seeds, models, expected):
    params = settings(tmp_path, "reward_model", seeds=seeds, reward_models=models, betas=[0.1])
    judges = [params.judge_of(trial) for trial in params.trials() if trial.method == "rloo"]
    assert [judge.model for judge in judges] == [f"models/rewards/{name}" for name in expected]
    other = settings(tmp_path, {"kind": "verifier"})
    assert other.judge_of(other.trials()[0]) == other.feedback


@pytest.mark.parametrize(
    ("feedback", "models", "words"),
    [
        ("reward_model", [], r"feedback: reward_model, but sweep.reward_models is \[\]; list one seed"),
        ("reward_model", [1, 2], r"reward_models is \[1, 2\]; list one seed, or every seed of sweep.seeds"),
        ({"kind": "reward_model", "model": "models/rewards/1"}, [1], "belongs to the stage reward_model; write"),
        (None, [1], "feedback: null, but sweep.rloo needs a judge"),
    ],
)
def test_unusable_feedback_is_an_error(tmp_path, feedback, models, words):
    with pytest.raises(InputError, match=words):
        settings(tmp_path, feedback, reward_models=models)
