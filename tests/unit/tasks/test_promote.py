"""The promotion gate: its decisions, its rows and its comparisons."""

import dataclasses
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
from tasks.tracking import champions, offline, registry, runs
from tasks.tracking.provenance import weights
from tests.support.project import TRIAL
from tests.support.training import PARAMS


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
