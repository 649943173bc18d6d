"""The promotion gate and the registry of champions."""

import dataclasses
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.common.errors import InputError
from dpo.common.files import write_json
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.engine.tokenization import encode_pairs
from dpo.evaluation.gate import kept_for_gate, significance_level
from dpo.evaluation.label_metrics import label_table
from dpo.evaluation.settings import CapabilitiesSettings, PromoteSettings
from dpo.training.losses import Kto
from tasks.commands import promote
from tasks.commands.promote import (
    Evidence,
    compete,
    contest_rows,
    decide,
    more_prompts,
    read_comparison,
    too_few,
    weigh,
)
from tasks.common import paths
from tasks.common.paths import EVAL, policy_margins, policy_samples
from tasks.report.promotion import describe
from tasks.tracking import champions, offline, registry, runs, sweeps
from tasks.tracking.provenance import weights
from tests.support.training import PARAMS

TRIAL = "sigmoid-0.1-0.01-17"


def evidence(value: float, p: float, level: float = 0.006) -> Evidence:
    return Evidence("win rate", "the champion, version 3", value, value - 0.07, value + 0.07, p, 2, level)


def test_a_significantly_better_policy_is_promoted():
    verdict = decide(TRIAL, [], evidence(0.61, 0.0059))
    assert verdict.promoted
    assert verdict.reason == (
        f"{TRIAL} is better: win rate against the champion, version 3: 0.610 [0.540, 0.680], p = 0.0059; "
        "comparison 2 with the champion, version 3 needs p of at most 0.006."
    )


@pytest.mark.parametrize(
    ("value", "p", "words"),
    [(0.55, 0.0061, "not significantly better"), (0.5, 0.5, "not significantly"), (0.4, 0.99, "worse")],
    ids=["tie", "equal", "worse"],
)
def test_an_equal_or_worse_policy_is_not_promoted(value, p, words):
    verdict = decide(TRIAL, [], evidence(value, p))
    assert not verdict.promoted
    assert words in verdict.reason


def test_a_policy_that_violates_a_guardrail_is_not_promoted_despite_its_win_rate():
    verdict = decide(TRIAL, ["lost diversity", "repetition"], evidence(0.97, 1e-9), "96 new responses.")
    assert not verdict.promoted
    assert "violates a guardrail (lost diversity, repetition)" in verdict.reason
    assert "0.970" in verdict.reason
    assert verdict.reason.endswith(" 96 new responses.")


@pytest.mark.parametrize(
    ("wins", "answers_each", "promoted"),
    [(7, 1, False), (8, 1, True), (3, 20, False)],
    ids=["7 of 7", "8 of 8", "60 of 60 to 3 prompts"],
)
def test_an_interval_without_width_promotes_only_if_the_sign_flip_test_rejects(wins, answers_each, promoted):
    prompts = [f"prompt {number}" for number in range(wins)] * answers_each
    level = significance_level(1, PromoteSettings())
    found = weigh("win rate", "the reference", prompts, [1.0] * len(prompts), 17, 1, level)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert found.p == pytest.approx(0.5**wins), "p of the exact one-sided sign test"
    assert decide(TRIAL, [], found).promoted is promoted
    assert (too_few(pd.Series(prompts), level, "Add some.") is None) is promoted


def test_a_loss_has_a_one_sided_p_near_1():
    found = weigh("win rate", "the reference", [*"abcdefghij"], [0.0] * 10, 17, 1, 0.01)
    assert found.p == pytest.approx(1 - 0.5**10)
    assert "worse" in decide(TRIAL, [], found).reason


def test_without_a_judge_the_gate_uses_the_pairs_that_the_choice_left_out(tiny_params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = tiny_params(None)
    trial = params.trials()[0]
    prompts = [str(number) for number in range(40)]
    kept = kept_for_gate(prompts)
    for path in (EVAL, policy_margins(trial)):
        path.parent.mkdir()
    table = pd.DataFrame({"id": range(40), "prompt": prompts, "correct": kept.astype(float)})
    table.drop(columns="correct").to_parquet(EVAL)
    table.to_parquet(policy_margins(trial))
    contest = contest_rows(params, trial, None, 1)
    assert contest.rows["id"].tolist() == list(np.flatnonzero(kept))
    figure, wins = compete(params, trial, None, contest)
    assert (figure, wins) == ("reward accuracy", [1.0] * kept.sum())


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


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """Return a new database of MLflow. To create it takes seconds, to copy it does not."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def models(tmp_path, monkeypatch, empty_store) -> list[str]:
    """Return the ids of three logged models in a new database."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment(offline.EXPERIMENT)
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


@pytest.fixture
def project(tiny_params, models):
    """Return the parameters in a folder with a base model, a reference and data."""
    for folder, name in ((paths.BASE, "model.safetensors"), (paths.REFERENCE, "tokenizer.json")):
        folder.mkdir(parents=True)
        (folder / name).write_text("first")
    paths.EVAL.parent.mkdir()
    held_out = pd.DataFrame({"id": range(6), "prompt": ["Same?", "b", "c", "d", "e", "f"]})
    held_out.to_parquet(paths.EVAL)
    pd.DataFrame({"prompt": ["same?", "x", "x"]}).to_parquet(paths.TRAIN)
    return tiny_params("scorer")


def crowned(params, models):
    """Promote a model under the current conditions, as the gate does."""
    client = mlflow.MlflowClient()
    run = client.create_run(client.get_experiment_by_name(offline.EXPERIMENT).experiment_id).info.run_id
    champions.log_prompts(run)
    tags = {"git_commit": "a" * 40, champions.RUN: run}
    return registry.promote(models[0], tags | champions.conditions(params))


def test_prompts_that_the_champion_was_trained_on_are_left_out_whatever_their_case(project, models):
    champion = crowned(project, models)
    policy_samples(project.trials()[0]).parent.mkdir()
    pd.DataFrame({"prompt": ["b"]}).to_parquet(policy_samples(project.trials()[0]))
    contest = contest_rows(project, project.trials()[0], champion, 1)
    assert set(contest.rows["prompt"]) == {"c", "d", "e", "f"}
    assert "1 held-out rows are left out: the champion was trained on their prompts." in contest.note
    assert len(contest.rows) == project.evaluate.samples
    assert contest.seed == project.seed + 1


def with_prompts(params, prompts):
    """Return parameters with a file of separate prompts."""
    path = Path("data/own/prompts.jsonl")
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame({"prompt": prompts}).to_json(path, orient="records", lines=True)
    return dataclasses.replace(params, evaluate=dataclasses.replace(params.evaluate, prompts=str(path)))


def test_with_separate_prompts_the_gate_draws_from_their_file(project, models, capsys):
    params = with_prompts(project, [f"Play {number}?" for number in range(6)])
    policy_samples(params.trials()[0]).parent.mkdir()
    pd.DataFrame({"prompt": ["Play 0?", "Play 1?"]}).to_parquet(policy_samples(params.trials()[0]))
    contest = contest_rows(params, params.trials()[0], None, 1)
    assert set(contest.rows["prompt"]) == {"Play 2?", "Play 3?", "Play 4?", "Play 5?"}
    assert "prompts that the choice did not use" in contest.note
    assert more_prompts(params) == "Add prompts to data/own/prompts.jsonl."
    pd.DataFrame({"prompt": ["PLAY 3?"]}).to_parquet(paths.TRAIN)
    champion = crowned(params, models)
    pd.DataFrame({"prompt": ["other"]}).to_parquet(paths.TRAIN)
    assert "Play 3?" not in set(contest_rows(params, params.trials()[0], champion, 2).rows["prompt"])
    later = with_prompts(project, [f"Play {number}?" for number in range(7)])
    assert "evaluate.prompts; the comparison is valid" in contest_rows(later, later.trials()[0], champion, 2).note
    pd.DataFrame({"prompt": ["play 2?"]}).to_parquet(paths.TRAIN)
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 3: a training pair has this prompt"):
        contest_rows(params, params.trials()[0], None, 1)


def test_without_a_judge_separate_prompts_do_not_replace_the_held_out_rows(project):
    params = with_prompts(project, ["Play 0?"])
    params = dataclasses.replace(params, evaluate=dataclasses.replace(params.evaluate, judges=()))
    assert set(contest_rows(params, params.trials()[0], None, 1).rows["prompt"]) <= set("bcdef") | {"Same?"}


def test_changes_since_the_promotion_are_named_and_comparable_with_a_judge(project, models):
    champion = crowned(project, models)
    assert champions.changes(project, champion) == []
    (paths.BASE / "model.safetensors").write_text("second")
    data = dataclasses.replace(project.data, eval_fraction=0.3)
    judges = (dataclasses.replace(project.evaluate.judges[0], function="other:judge"),)
    evaluate = dataclasses.replace(project.evaluate, judges=judges)
    (sentence,) = champions.changes(dataclasses.replace(project, data=data, evaluate=evaluate), champion)
    assert sentence.startswith(
        "Changed since version 1: base model, judge, data.eval_fraction; the comparison is valid"
    )


@pytest.mark.parametrize("part", ["base", "tokenizer"])
def test_without_a_judge_another_base_or_tokenizer_is_not_comparable(part, project, models, tiny_params):
    params = tiny_params(None)
    champion = crowned(params, models)
    path = {"base": paths.BASE / "model.safetensors", "tokenizer": paths.REFERENCE / "tokenizer.json"}[part]
    path.write_text("second")
    with pytest.raises(InputError, match=rf"version 1 of dpo-policy is not comparable: {part}.*--champion none"):
        champions.changes(params, champion)


def test_runs_with_equal_weights_are_told_apart_by_role_and_trial(project, models):
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(offline.EXPERIMENT).experiment_id
    same = weights(paths.BASE)
    made = {}
    for role, trial in (("policy", "a"), ("policy", "b"), ("reference", None)):
        tags = {offline.CHECKPOINT: same, offline.ROLE: role} | ({offline.TRIAL: trial} if trial else {})
        made[trial] = client.create_run(experiment, tags=tags).info.run_id
    for name in ("a", "b"):
        folder = Path("models") / name
        folder.mkdir()
        (folder / "model.safetensors").write_text("first")
        assert runs.run_of(folder).info.run_id == made[name]
    (paths.REFERENCE / "model.safetensors").write_text("first")
    assert runs.run_of(paths.REFERENCE).info.run_id == made[None]


def test_the_champion_is_loaded_as_the_engine_loads_models(tmp_path, monkeypatch):
    loaded = []
    engine = dataclasses.replace(PARAMS.engine, precision="bf16", quantization="nf4", vocabulary="bf16")
    monkeypatch.setattr(
        promote, "load_model", lambda *given, **options: loaded.append((*given, options)) or Loaded()
    )
    monkeypatch.setattr(promote, "load_tokenizer", lambda folder: folder)
    monkeypatch.setattr(promote.champions, "download", lambda *_: tmp_path)
    params = SimpleNamespace(engine=engine)
    for champion, folder in ((None, promote.paths.REFERENCE), (object(), tmp_path / "model")):
        with promote.opponent(params, champion):
            assert loaded.pop() == (folder, {**engine.loading, "frozen": True})


class Loaded:
    """A model that is never used."""

    def to(self, _):
        return self


def policy_of_a_sweep(rate: float, pairs: str) -> tuple[str, str, dict[str, str]]:
    """Return the ids of a new sweep and of its policy, and the tags of its promotion."""
    sweep = offline.new_run("sweep", {offline.ROLE: "sweep"})
    policy = offline.new_run(TRIAL, {offline.ROLE: "policy", "mlflow.parentRunId": sweep})
    for name, value in (("", rate), ("_low", rate - 0.1), ("_high", rate + 0.1)):
        mlflow.MlflowClient().log_metric(policy, f"eval/win_rate{name}", value)
    tags = {"git_commit": "a" * 40, "trial": TRIAL, "run": policy, registry.PAIRS: pairs}
    return sweep, policy, tags


def test_the_page_of_a_promotion_compares_old_and_new_figures(models, monkeypatch):
    monkeypatch.setenv("DPO_MLFLOW_PAGES", "http://127.0.0.1:5000")
    registry.promote(models[0], policy_of_a_sweep(0.6, "80")[2])
    second = registry.promote(models[1], policy_of_a_sweep(0.7, "90")[2])
    page = describe(second)
    assert "[version 2](http://127.0.0.1:5000/#/models/dpo-policy/versions/2)" in page
    assert f"commit: `{'a' * 40}`" in page
    assert "training rows: 90" in page
    assert "| figure | version 1 | version 2 |" in page
    assert "| win rate against the reference | 0.600 [0.500, 0.700] | 0.700 [0.600, 0.800] |" in page


def test_the_list_of_sweeps_shows_date_commit_verdict_and_which_one_serves(models):
    made = [policy_of_a_sweep(0.6, "80") for _ in range(3)]
    for number, (_, policy, tags) in enumerate(made):
        if number < 2:
            registry.promote(models[number], tags)
        sweeps.record_decision(policy, "promoted" if number < 2 else "kept", "why")

    def names() -> list[str]:
        return [mlflow.get_run(sweep).info.run_name for sweep, _, _ in made]

    assert all(re.match(r"sweep \d{4}-\d\d-\d\d \d\d:\d\d \w{4,7}: ", name) for name in names())
    verdicts = [name.partition(": ")[2] for name in names()]
    assert verdicts == ["promoted", "promoted, serves as version 2", "kept"]
    registry.set_champion("1")
    sweeps.name_sweeps()
    verdicts = [name.partition(": ")[2] for name in names()]
    assert verdicts == ["promoted, serves as version 1", "promoted", "kept"]


def test_without_a_judge_labelled_rows_are_won_by_the_policy_that_has_the_sign_of_more_of_them(
    tiny_params, tiny_model_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    params = tiny_params(None)
    trial = dataclasses.replace(params.trials()[0], loss=Kto())
    desirable = np.arange(24) % 3 > 0
    texts = [f"Film {number} is a joy." for number in range(24)]
    held_out = pd.DataFrame({"id": [f"row {n}" for n in range(24)], "prompt": [f"Film {n}?" for n in range(24)]})
    held_out["chosen"] = [text if label else None for text, label in zip(texts, desirable, strict=True)]
    held_out["rejected"] = [None if label else text for text, label in zip(texts, desirable, strict=True)]
    held_out = held_out.assign(source=None, agreement=np.nan)
    tokenizer, opponent = AutoTokenizer.from_pretrained(tiny_model_dir), load_model(tiny_model_dir)
    theirs = plain_logps(tiny_model_dir, tokenizer, held_out["prompt"], texts)

    # Reference log-probs with known distances to those of both policies.
    generator = np.random.default_rng(0)
    reference = theirs - generator.choice([-1.0, 1.0], 24)
    own = reference + generator.choice([-2.0, 2.0], 24)
    both, lengths = (torch.tensor(np.stack([each, each], 1)) for each in (reference, np.full(24, 3)))
    stored = label_table(held_out, torch.tensor(np.stack([own, own], 1)), both, lengths, trial)
    for path, table in ((EVAL, held_out), (policy_margins(trial), stored)):
        path.parent.mkdir()
        table.to_parquet(path)

    contest = contest_rows(params, trial, None, 1)
    assert 0 < len(contest.rows) < 24
    right = desirable == (own > reference)
    kept = kept_for_gate(held_out["prompt"].tolist())
    figure, wins = compete(params, trial, None, contest)
    assert (figure, wins) == ("reward accuracy", right[kept].astype(float).tolist())

    monkeypatch.setattr(promote, "opponent", lambda *_: nullcontext((opponent, tokenizer)))
    figure, wins = compete(params, trial, object(), contest)
    expected = (1 + right.astype(float) - (desirable == (theirs > reference))) / 2
    assert figure == "win rate in ranking held-out rows"
    assert wins == expected[kept].tolist()
    assert {*wins} == {0.0, 0.5, 1.0}


def plain_logps(folder, tokenizer, prompts, texts):
    """Return the log-prob of each completion with its end token, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = zip(prompts, texts, strict=True)
    rows = encode_pairs(
        [{"id": "", "prompt": prompt, "chosen": text, "rejected": None} for prompt, text in pairs],
        tokenizer, 512,
    )  # fmt: skip
    found = []
    for row in rows:
        (completion,) = row.completions
        ids = torch.tensor([[*row.prompt, *completion]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, len(row.prompt) - 1 : -1]
        found.append(logps.gather(1, torch.tensor(completion)[:, None].long()).sum().item())
    return np.array(found)


def test_a_task_that_fell_beyond_the_limit_blocks_promotion_and_a_missing_result_is_an_error(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    params = dataclasses.replace(PARAMS, capabilities=CapabilitiesSettings(tasks=("a", "b")))
    trial = params.trials()[0]
    for task, difference in (("a", -0.06), ("b", -0.04)):
        found = {"policy": trial.name, "higher_is_better": True,
                 "differences": {"reference": {"difference": difference}}}  # fmt: skip
        write_json(paths.capability(task), found)
    assert promote.lost_capabilities(params, trial) == ["lost capability: a fell by 0.06, limit 0.05"]
    write_json(paths.capability("b"), {"task": "b", "policy": None})
    with pytest.raises(
        InputError, match=rf"metrics/capabilities/b\.json: no result of {trial.name}; run `dvc repro`"
    ):
        promote.lost_capabilities(params, trial)
