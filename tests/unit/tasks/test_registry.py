"""The registry of champions: promotions, rollbacks and changes by hand."""

import mlflow
import pytest

from dpo.common.errors import InputError
from tasks.tracking import champions, offline, registry
from tests.support.project import TRIAL


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


def promoted_versions(models, count=2):
    for number in range(count):
        registry.promote(models[number], {"git_commit": "abc"[number] * 40, "trial": TRIAL})
    return mlflow.MlflowClient()


def assert_refused(words):
    for check in (registry.champion, registry.predecessor):
        with pytest.raises(InputError, match=words):
            check()


def test_a_removed_alias_is_refused_and_can_be_restored(models):
    client = promoted_versions(models)
    client.delete_registered_model_alias(registry.REGISTERED, "champion")
    assert_refused("has no champion, but version 2 was promoted.*`dpo promote --champion 2`")
    registry.set_champion("2")
    assert registry.champion().version in (2, "2")


def test_a_moved_alias_is_refused_and_can_be_accepted(models):
    client = promoted_versions(models)
    client.set_registered_model_alias(registry.REGISTERED, "champion", "1")
    assert_refused("has version 1 as champion, but version 2 was promoted.*`dpo promote --champion 2`")
    registry.set_champion("1")
    assert aliases() == {"champion": "1"}
    assert str(registry.champion().version) == "1"


def test_a_deleted_version_is_refused_with_an_earlier_champion(models):
    client = promoted_versions(models)
    client.delete_model_version(registry.REGISTERED, "2")
    assert_refused("version 2 was promoted.*was deleted.*`dpo promote --champion 1`, an earlier champion")
    with pytest.raises(InputError, match="version 2 of dpo-policy does not exist"):
        registry.set_champion("2")
    registry.set_champion("1")
    assert str(registry.champion().version) == "1"


def test_a_deleted_predecessor_is_refused(models):
    client = promoted_versions(models, 3)
    client.delete_model_version(registry.REGISTERED, "2")
    assert str(registry.champion().version) == "3"
    with pytest.raises(InputError, match="version 2 of dpo-policy does not exist"):
        registry.predecessor()


def test_a_champion_without_tags_is_refused(models):
    client = promoted_versions(models)
    client.delete_model_version_tag(registry.REGISTERED, "2", "git_commit")
    assert_refused("version 2 of dpo-policy has no tag git_commit")
    registry.set_champion("none")
    assert registry.champion() is None
    third = registry.promote(models[2], {"git_commit": "c" * 40})
    assert (str(third.version), third.tags["predecessor"]) == ("3", "none")


def test_a_deleted_registry_is_refused_and_can_start_over(models):
    client = promoted_versions(models)
    run = client.create_run(client.get_experiment_by_name(offline.EXPERIMENT).experiment_id)
    client.set_tag(run.info.run_id, registry.DECISION, "promoted")
    client.delete_registered_model(registry.REGISTERED)
    with pytest.raises(InputError, match=r"dpo-policy was deleted after a promotion.*--champion none"):
        registry.champion()
    registry.set_champion("none")
    assert registry.champion() is None


def test_an_interrupted_move_of_the_alias_is_no_change_by_hand(models, monkeypatch):
    client = promoted_versions(models)
    _, earlier = registry.predecessor()
    move = mlflow.MlflowClient.set_registered_model_tag
    tags = []

    def interrupt(self, name, key, value):
        tags.append(value)
        if len(tags) == 2:
            raise KeyboardInterrupt
        move(self, name, key, value)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_tag", interrupt)
    with pytest.raises(KeyboardInterrupt):
        registry.roll_back(earlier)
    assert tags == ["2 1", "1"]
    assert str(registry.champion().version) == "1"
    monkeypatch.undo()
    registry.roll_back(earlier)
    assert client.get_registered_model(registry.REGISTERED).tags[registry.POINTER] == "1"


def test_missing_artifacts_of_a_champion_are_refused_with_the_fix(models, tmp_path):
    promoted_versions(models, 1)
    with pytest.raises(
        InputError, match=r"artifacts of models:/dpo-policy/1, the champion, are missing.*--champion"
    ):
        champions.download(registry.champion(), str(tmp_path / "to"))
    with pytest.raises(InputError, match="training prompts of version 1 of dpo-policy are missing"):
        champions.trained_prompts(registry.champion())


def test_comparisons_are_counted_per_champion_and_a_repeated_gate_counts_once(models):
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(offline.EXPERIMENT).experiment_id
    made = [client.create_run(experiment).info.run_id for _ in range(3)]
    assert [champions.comparison_number(run, "reference") for run in made] == [1, 2, 3]
    assert [champions.comparison_number(run, "reference") for run in made[::-1]] == [3, 2, 1]
    assert [champions.comparison_number(run, "4") for run in made[:2]] == [1, 2]
