"""The promotion gate and the registry of champions."""

import dataclasses
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from scipy.stats import binom

from dpo.common.errors import InputError
from dpo.config import load_params
from tasks.commands.promote import Evidence, against_reference, decide, read_comparison, weigh
from tasks.common.paths import policy_margins, policy_samples
from tasks.tracking import registry

TRIAL = "sigmoid-0.1-0.01-17"


def evidence(value: float, low: float, high: float, p: float = 0.001) -> Evidence:
    return Evidence("win rate", "the champion, version 3", value, low, high, p)


def test_a_significantly_better_policy_is_promoted():
    verdict = decide(TRIAL, [], evidence(0.61, 0.54, 0.68))
    assert verdict.promoted
    assert f"{TRIAL} is better: win rate against the champion, version 3: 0.610 [0.540, 0.680]" in verdict.reason


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((0.55, 0.48, 0.62), "not significantly better"),
        ((0.5, 0.5, 0.5), "not significantly"),
        ((0.4, 0.33, 0.47), "worse"),
    ],
    ids=["tie", "equal", "worse"],
)
def test_an_equal_or_worse_policy_is_not_promoted(figures, words):
    verdict = decide(TRIAL, [], evidence(*figures))
    assert not verdict.promoted
    assert words in verdict.reason


def test_an_interval_that_starts_at_one_half_does_not_promote():
    assert not decide(TRIAL, [], evidence(0.6, 0.5, 0.7)).promoted
    assert decide(TRIAL, [], evidence(0.6, 0.5000001, 0.7)).promoted


def test_a_policy_that_violates_a_guardrail_is_not_promoted_despite_its_win_rate():
    verdict = decide(TRIAL, ["lost diversity", "repetition"], evidence(0.97, 0.94, 0.99))
    assert not verdict.promoted
    assert "violates a guardrail (lost diversity, repetition)" in verdict.reason
    assert "0.970" in verdict.reason


@pytest.mark.parametrize(
    ("wins", "answers_each", "promoted"),
    [(5, 1, False), (6, 1, True), (8, 1, True), (3, 20, False)],
    ids=["5 of 5", "6 of 6", "8 of 8", "60 of 60 to 3 prompts"],
)
def test_an_interval_without_width_promotes_only_if_the_sign_flip_test_rejects(wins, answers_each, promoted):
    prompts = [f"prompt {number}" for number in range(wins)] * answers_each
    found = weigh("win rate", "the reference", prompts, [1.0] * len(prompts), 17)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert found.p == pytest.approx(2 * binom(wins, 0.5).pmf(wins)), "p of the exact sign test"
    assert decide(TRIAL, [], found).promoted is promoted


@pytest.mark.parametrize(("judge", "figure"), [(None, "reward accuracy"), ("scorer", "win rate")])
def test_the_first_champion_is_compared_with_the_reference(judge, figure, tiny_params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = tiny_params(judge)
    trial = params.trials()[0]
    prompts = [str(number) for number in range(20)]
    for path, column, wins in (
        (policy_samples(trial), "win", [1.0] * 18 + [0.0] * 2),
        (policy_margins(trial), "correct", [1.0] * 11 + [0.0] * 9),
    ):
        path.parent.mkdir()
        pd.DataFrame({"prompt": prompts, column: wins}).to_parquet(path)
    found = against_reference(params, trial)
    assert (found.figure, found.against) == (figure, "the reference")
    assert decide(TRIAL, [], found).promoted is (judge is not None)


@pytest.fixture
def tiny_params():
    """Return the parameters of this repository with or without the judge."""
    params = load_params(Path(__file__).parents[3] / "params.yaml")

    def make(judge: str | None):
        judges = params.evaluate.judges if judge else ()
        return dataclasses.replace(params, evaluate=dataclasses.replace(params.evaluate, judges=judges))

    return make


def test_the_error_for_a_missing_comparison_names_file_and_fix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"metrics/comparison\.json.*dvc repro"):
        read_comparison()


@pytest.fixture
def models(tmp_path, monkeypatch) -> list[str]:
    """Return the ids of three logged models in a new database."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment("test")
    made = [mlflow.initialize_logged_model(name="policy") for _ in range(3)]
    for model in made:
        mlflow.finalize_logged_model(model.model_id, "READY")
    return [model.model_id for model in made]


def aliases() -> dict[str, str]:
    return {k: str(v) for k, v in mlflow.MlflowClient().get_registered_model(registry.REGISTERED).aliases.items()}


def test_rollbacks_restore_each_predecessor(models):
    assert registry.champion() is None
    with pytest.raises(InputError, match="no champion"):
        registry.predecessor()
    first = registry.promote(models[0], {"git_commit": "a" * 40, "trial": TRIAL})
    assert aliases() == {"champion": "1"}
    with pytest.raises(InputError, match="first champion"):
        registry.predecessor()
    second = registry.promote(models[1], {"git_commit": "b" * 40})
    third = registry.promote(models[2], {"git_commit": "c" * 40})
    assert aliases() == {"champion": "3", "previous": "2"}
    assert third.tags["predecessor"] == str(second.version)
    assert first.tags["git_commit"] == "a" * 40

    for left in ({"champion": "2", "previous": "1"}, {"champion": "1"}):
        _, earlier = registry.predecessor()
        registry.roll_back(earlier)
        assert aliases() == left
    with pytest.raises(InputError, match="first champion"):
        registry.predecessor()


def test_a_model_that_becomes_champion_again_gets_a_new_version(models):
    first = registry.promote(models[0], {"git_commit": "a" * 40})
    second = registry.promote(models[1], {"git_commit": "b" * 40})
    again = registry.promote(models[0], {"git_commit": "c" * 40})
    assert again.version not in (first.version, second.version)
    assert registry.version(first.version).tags["git_commit"] == "a" * 40


def test_the_version_of_an_interrupted_promotion_is_reused(models):
    left = mlflow.register_model(f"models:/{models[0]}", registry.REGISTERED)
    assert registry.promote(models[0], {"git_commit": "a" * 40}).version == left.version
    assert len(mlflow.MlflowClient().search_model_versions(f"name = '{registry.REGISTERED}'")) == 1
