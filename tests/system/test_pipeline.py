"""The pipeline on a tiny random model, run by `dvc repro` as a user does."""

import hashlib
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from tests.support.project import ENV, ROOT, TRIAL, change, execute, make_project

LINEAGE = (sys.executable, "-m", "tasks.commands.cli", "lineage")
STAGES = ["fetch_model", "ingest", "validate", "tokens", "sft", "reference_logprobs", "reference_samples"]


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Run all stages once through DVC."""
    folder = make_project(tmp_path_factory.mktemp("project"), tiny_model_dir)
    output = execute(folder, "dvc", "repro")
    assert stages_run(output) == [*STAGES, f"train@{TRIAL}", f"evaluate@{TRIAL}", "compare"]
    return folder


def test_training_starts_at_margin_zero_and_loss_log_2_with_the_reference_cache(project):
    log = pd.read_csv(project / f"metrics/train/{TRIAL}.csv")
    assert log["rewards/margins"].iloc[0] == 0.0
    assert log["rewards/chosen"].iloc[0] == 0.0
    assert log["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-7)
    assert log["rewards/margins"].iloc[-1] > 0.1


def test_evaluation_writes_the_main_metrics(project):
    metrics = json.loads((project / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert metrics["pairs"] == 16
    assert metrics["human_ceiling"] == 0.75
    assert 0 <= metrics["reward_accuracy"] <= 1
    assert metrics["margin_ci"][0] <= metrics["margin"] <= metrics["margin_ci"][1]
    assert metrics["kl"] > 0
    assert "win_rate" in metrics
    compared = json.loads((project / "metrics/comparison.json").read_text())["policies"][TRIAL]
    assert compared == metrics | {"failure_modes": compared["failure_modes"]}


def test_checkpoints_are_plain_transformers_models(project):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("reference", TRIAL):
        AutoTokenizer.from_pretrained(project / "models" / name)
        AutoModelForCausalLM.from_pretrained(project / "models" / name)


def test_report_and_results_table_show_metrics_and_selection(project):
    page = (project / "reports/index.html").read_text()
    comparison = json.loads((project / "metrics/comparison.json").read_text())
    for words in ("Judged reward against KL", "Say something about film", "Failure modes", "Worst losses"):
        assert words in page
    text = re.sub(r"<[^>]+>", "", page)
    assert comparison["reason"] in text
    head = page.partition("<h2>")[0]
    assert all(f"<dt>{name}</dt>" in head for name in ("Model", "Data", "Date", "Commit"))
    assert f"<code>{TRIAL}</code> is " in head
    assert page.count(f'<span class="dot" style="background: #3b82f6"></span>{TRIAL}') >= 2
    assert comparison["selected"] == TRIAL
    assert "<script src" not in page
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""src=["']?http|<link""", outside_scripts), "the page opens offline"
    assert re.search(r'href="http://127.0.0.1:5000/#/experiments/1/runs/\w{32}">MLflow run', page)
    table = execute(project, sys.executable, "-m", "tasks.commands.cli", "results")
    assert "reward accuracy" in table
    assert f"{TRIAL} has the highest win rate" in " ".join(table.split())
    assert "make mlflow" in table


def test_the_base_model_is_sampled_once_and_compared_with_reference_and_policy(project):
    reference = pd.read_parquet(project / "samples/reference.parquet")
    samples = pd.read_parquet(project / f"samples/{TRIAL}.parquet")
    metrics = json.loads((project / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert samples["base_response"].notna().tolist() == [True] * 6 + [False] * 2, "kl_samples of the responses"
    samples, reference = samples.head(6), reference.head(6)
    assert samples["base_response"].tolist() == reference["base_response"].tolist()
    assert (reference["base_response"] != reference["response"]).any()
    base_score = reference["base_score/vader_compound"]
    for side, scores in (("", samples["score"]), ("reference_", samples["reference_score"])):
        wins = (scores > base_score) + 0.5 * (scores == base_score)
        assert metrics[f"{side}base_win_rate"] == pytest.approx(wins.mean())
        low, high = metrics[f"{side}base_win_rate_ci"]
        assert low <= wins.mean() <= high
    tokens = [row for row in Dataset.from_file(str(project / "tokens/eval/table.arrow"))]
    model = AutoModelForCausalLM.from_pretrained(project / "models/base", dtype=torch.float64)
    total = count = 0
    for row in tokens:
        for completion in row["completions"]:
            ids = torch.tensor([[*row["prompt"], *completion]])
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, len(row["prompt"]) - 1 : -1]
            total += logps.gather(1, torch.tensor(completion)[:, None]).sum().item()
            count += len(completion)
    assert metrics["base_perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)
    page = (project / "reports/index.html").read_text()
    assert '<td class="name">base model</td>' in page
    assert "win rate against the base model" in (project / f"models/{TRIAL}.md").read_text()


@pytest.mark.slow
def test_prompts_of_a_file_replace_the_held_out_prompts_and_sft_null_has_no_base_row(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy", symlinks=True)
    prompts = [{"prompt": f"What about play {number}?"} for number in range(5)]
    prompts.append({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]})
    (copy / "data/own/prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in prompts))
    assert "ingest" in execute(copy, "dvc", "status"), "files in data/own are inputs of the stages"
    change(copy, {"evaluate.prompts": "data/own/prompts.jsonl", "sft": None, "evaluate.samples": 12})
    for stage in (["tasks.reference_samples"], ["tasks.evaluate", TRIAL], ["tasks.compare"]):
        execute(copy, sys.executable, "-m", *stage)
    samples = pd.read_parquet(copy / "samples/reference.parquet")
    assert samples["prompt"].nunique() == 6
    assert set(samples["source"]) == {"prompts.jsonl"}
    assert not [name for name in samples if name.startswith("base_")]
    metrics = json.loads((copy / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert (metrics["pairs"], metrics["samples"]) == (16, 12)
    assert not [name for name in metrics if "base_" in name]
    page = (copy / "reports/index.html").read_text()
    assert "base model</td>" not in page
    assert "12 prompts, drawn from <code>data/own/prompts.jsonl</code>" in page
    assert '<span class="label">system</span>Be brief.' in page, "turns are shown as turns"


def test_samples_and_margins_agree_with_the_metrics(project):
    samples = pd.read_parquet(project / f"samples/{TRIAL}.parquet")
    metrics = json.loads((project / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert len(samples) == metrics["samples"] == 8
    assert samples["kl"].notna().tolist() == [True] * 6 + [False] * 2
    assert samples["kl"].mean() == pytest.approx(metrics["kl"])
    assert samples["implicit_reward"].mean() == pytest.approx(metrics["implicit_reward"])
    assert metrics["kl_samples"] == 6
    assert samples["win"].mean() == pytest.approx(metrics["win_rate"])
    margins = pd.read_parquet(project / f"margins/{TRIAL}.parquet")
    assert margins["margin"].mean() == pytest.approx(metrics["margin"])
    assert {"frontier", "calibration", "slices", "tests"} <= {f.stem for f in (project / "metrics").glob("*.csv")}


def test_model_card_is_valid_for_the_hub_and_names_the_weights(project):
    card = ModelCard.load(project / f"models/{TRIAL}.md")
    metrics = json.loads((project / f"metrics/evaluate/{TRIAL}.json").read_text())
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["reward_accuracy"] == metrics["reward_accuracy"]
    assert card.data.library_name == "transformers"
    assert metrics["weights"] in card.text
    assert metrics["sampler"] == "transformers"
    assert "sampled with `transformers`" in card.text
    assert "8 responses of at most 6 tokens, with KL on 6 of them," in card.text
    page = (project / "reports/index.html").read_text()
    assert "sampled with <code>transformers</code>" in page
    assert "KL is measured on 6 of the responses." in page


def test_lineage_of_a_checkpoint_and_of_its_mlflow_model_are_equal(project, tmp_path):
    moved = shutil.copytree(project / f"models/{TRIAL}", tmp_path / "moved")
    facts = json.loads(execute(ROOT, *LINEAGE, str(moved), "--json"))
    manifest = json.loads((project / "reference/train/manifest.json").read_text())
    assert facts["models"]["models/reference"] == manifest["weights"]
    assert facts["params"]["trial"] == {"loss": "sigmoid", "beta": 0.1, "learning_rate": 0.01, "seed": 17}
    assert facts["data"]["data/train.parquet"] in (project / "dvc.lock").read_text()
    assert len(facts["git_commit"]) == 40
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    assert mlflow.get_run(facts["mlflow_run"]).data.tags["dpo.trial"] == TRIAL
    (policy,) = mlflow.search_logged_models(
        experiment_ids=["1"], filter_string="name = 'policy'", output_format="list"
    )
    uri = f"models:/{policy.model_id}"
    assert json.loads(execute(project, *LINEAGE, uri, "--json")) == facts


@pytest.mark.slow
def test_mlflow_models_of_policy_and_reference_generate_responses(project):
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    models = {m.name: m for m in mlflow.search_logged_models(experiment_ids=["1"], output_format="list")}
    assert sorted(models) == ["policy", "reference"]
    code = (
        "import mlflow, sys; mlflow.set_tracking_uri('sqlite:///mlflow.db')\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "answer = model.predict({'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 4})\n"
        "print('tokens', answer[0]['usage']['completion_tokens'], bool(model.metadata.signature))"
    )
    output = execute(project, sys.executable, "-c", code, f"models:/{models['policy'].model_id}")
    assert "tokens 4 True" in output


def test_mlflow_has_the_runs_of_the_sweep(project):
    mlflow.set_tracking_uri(f"sqlite:///{project}/mlflow.db")
    runs = mlflow.search_runs(experiment_names=["dpo-pipeline"], output_format="list")
    roles = {run.data.tags["dpo.role"]: run for run in runs}
    assert sorted(roles) == ["data", "policy", "reference", "sweep"]
    policy, sweep = roles["policy"], roles["sweep"]
    assert policy.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert policy.data.params["beta"] == "0.1"
    assert policy.data.params["learning_rate"] == "0.01"
    assert len(policy.data.tags["git_commit"]) == 40
    evaluated = json.loads((project / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert policy.data.metrics["eval/reward_accuracy"] == evaluated["reward_accuracy"]
    assert sweep.data.metrics[f"{TRIAL}/kl"] == evaluated["kl"]
    digests = {data.dataset.name: data.dataset.digest for data in policy.inputs.dataset_inputs}
    md5 = hashlib.md5((project / "data/train.parquet").read_bytes(), usedforsecurity=False).hexdigest()
    assert digests["train"] == md5
    assert md5 in (project / "dvc.lock").read_text()
    curve = mlflow.MlflowClient().get_metric_history(policy.info.run_id, "train/rewards/margins")
    assert [point.step for point in curve] == list(range(1, len(curve) + 1))
    assert len(curve) == 3
    (evaluation,) = mlflow.MlflowClient().get_metric_history(policy.info.run_id, "eval/kl")
    assert policy.info.end_time < evaluation.timestamp, "the duration of a run is that of the training"


@pytest.mark.slow
def test_same_seed_gives_the_same_checkpoint(project):
    weights = project / f"models/{TRIAL}/model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    execute(project, "dvc", "repro", "--force", "--single-item", f"train@{TRIAL}")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    again = stages_run(execute(project, "dvc", "repro"))
    assert again == [f"evaluate@{TRIAL}", "compare"], "provenance names another run, the cost has other minutes"


@pytest.mark.slow
def test_unchanged_stages_are_skipped_and_a_new_beta_runs_only_its_trial(project):
    assert stages_run(execute(project, "dvc", "repro")) == []
    other = TRIAL.replace("0.1", "0.5")
    change(project, {"sweep.betas": [0.1, 0.5]})
    assert stages_run(execute(project, "dvc", "repro")) == [f"train@{other}", f"evaluate@{other}", "compare"]
    assert "up to date" in execute(project, "dvc", "status")


@pytest.mark.slow
def test_a_loss_that_params_yaml_does_not_list_needs_an_entry(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project", symlinks=True)
    sweep = ("dvc", "exp", "run", "-S", "sweep.losses=[sigmoid, wpo, ld_dpo, custom]")
    sweep += ("-S", "sweep.reference_free_losses=[simpo]")
    refused = execute(folder, *sweep, fails=True)
    assert "losses.wpo" in refused
    assert "missing" in refused
    mine = "def loss(pairs, beta):\n    return -beta * (pairs.policy[:, 0] - pairs.policy[:, 1])\n"
    (folder / "functions/losses/mine.py").write_text(mine)
    entries = [f"+losses.{name}={{}}" for name in ("simpo", "wpo", "ld_dpo")]
    entries += ["+losses.custom.function=functions.losses.mine:loss"]
    output = execute(folder, *sweep, *(word for entry in entries for word in ("-S", entry)))
    trials = [f"{name}-{TRIAL.partition('-')[2]}" for name in ("simpo", "wpo", "ld_dpo", "custom")]
    expected = {f"train@{trial}" for trial in trials[1:]} | {
        f"{name}_reference_free@{trials[0]}" for name in ("train", "evaluate")
    }
    assert expected <= set(stages_run(output))
    for trial in trials:
        metrics = json.loads((folder / f"metrics/evaluate/{trial}.json").read_text())
        assert math.isfinite(metrics["loss_rise"])
    assert "up to date" in execute(folder, "dvc", "status")
    (folder / "functions/losses/mine.py").write_text(mine.replace("-beta", "-2 * beta"))
    stale = set(json.loads(execute(folder, "dvc", "status", "--json")))
    assert {f"train@{trials[-1]}", f"evaluate@{trials[-1]}"} <= stale
    assert not stale & {"sft", "reference_logprobs", "reference_samples"}
    (folder / "functions/losses/mine.py").write_text("def loss(pairs):\n    return pairs\n")
    refused = execute(folder, "dvc", "repro", "--force", "--single-item", "ingest", fails=True)
    assert "losses.custom.function: 'functions.losses.mine:loss' cannot be called as loss(pairs, beta)" in refused


@pytest.mark.slow
def test_a_reference_free_trial_does_not_wait_for_reference_log_probs(project, tmp_path):
    folder = shutil.copytree(project, tmp_path / "project", symlinks=True)
    shutil.rmtree(folder / "reference")
    sweep = {"sweep.losses": [], "sweep.reference_free_losses": ["simpo"], "sweep.betas": [0.1]}
    change(folder, {**sweep, "losses.simpo": {}})
    trial = TRIAL.replace("sigmoid", "simpo")
    execute(folder, "dvc", "repro", "--single-item", f"train_reference_free@{trial}")
    assert not (folder / "reference").exists()
    output = execute(folder, "dvc", "repro")
    assert stages_run(output)[-2:] == [f"evaluate_reference_free@{trial}", "compare"]
    assert not [stage for stage in stages_run(output) if stage.startswith("train")]
    assert list(json.loads((folder / "metrics/comparison.json").read_text())["policies"]) == [trial]
    assert "up to date" in execute(folder, "dvc", "status")


@pytest.mark.slow
def test_push_and_pull_bring_a_clean_clone_up_to_date(project, tmp_path):
    execute(project, "dvc", "remote", "add", "--default", "--local", "store", str(tmp_path / "store"))
    execute(project, "git", "add", "-A")
    execute(project, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "results")
    execute(project, "dvc", "push")
    clone = tmp_path / "clone"
    execute(tmp_path, "git", "clone", "-q", str(project), str(clone))
    execute(clone, "dvc", "remote", "add", "--default", "--local", "store", str(tmp_path / "store"))
    execute(clone, "dvc", "pull")
    assert stages_run(execute(clone, "dvc", "repro")) == []
    assert "up to date" in execute(clone, "dvc", "status")


@pytest.mark.slow
def test_a_second_judge_adds_its_win_rate_and_does_not_change_the_selection(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy", symlinks=True)
    (copy / "functions/judges/length.py").write_text(
        "def length(prompts, responses): return [len(text) for text in responses]\n"
    )
    before = json.loads((copy / "metrics/comparison.json").read_text())
    first = {"kind": "scorer", "function": "dpo.evaluation.judges.scorer:vader_compound"}
    change(copy, {"evaluate.judges": [first, {"kind": "scorer", "function": "functions.judges.length:length"}]})
    for stage in (["tasks.reference_samples"], ["tasks.evaluate", TRIAL], ["tasks.compare"]):
        execute(copy, sys.executable, "-m", *stage)
    samples = pd.read_parquet(copy / f"samples/{TRIAL}.parquet")
    assert (samples["score/length"] == samples["response"].str.len()).all()
    assert (samples["reference_score/length"] == samples["reference_response"].str.len()).all()
    after = json.loads((copy / "metrics/comparison.json").read_text())
    metrics = after["policies"][TRIAL]
    assert metrics["win_rate/length"] == samples["win/length"].mean()
    assert (after["selected"], after["reason"]) == (before["selected"], before["reason"])
    assert {name: metrics[name] for name in before["policies"][TRIAL]} == before["policies"][TRIAL]
    assert "win rate by length" in (copy / "reports/index.html").read_text()
    assert "judged by length" in (copy / f"models/{TRIAL}.md").read_text()


@pytest.fixture
def run_stage(project, monkeypatch, capsys):
    """Return a function that runs a stage in this process, and returns the error that it ends with."""

    def run(*words: str) -> str:
        monkeypatch.chdir(project)
        monkeypatch.setattr(sys, "argv", list(words))
        monkeypatch.delitem(sys.modules, words[0], raising=False)  # another test may have imported it
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[0], run_name="__main__")
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(("stage", "split"), [("train", "train"), ("evaluate", "eval")])
def test_stale_reference_cache_is_an_error(project, run_stage, stage, split):
    manifest = project / f"reference/{split}/manifest.json"
    original = manifest.read_text()
    manifest.write_text(original.replace('"max_length": 128', '"max_length": 127'))
    output = run_stage(f"tasks.{stage}", TRIAL)
    manifest.write_text(original)
    assert f"reference/{split}: stale reference cache, refused: max_length differ" in output


def test_evaluate_refuses_a_reference_that_changed(project, run_stage):
    weights = project / "models/reference/model.safetensors"
    original = weights.read_bytes()
    weights.unlink()
    shutil.copy(project / f"models/{TRIAL}/model.safetensors", weights)
    output = run_stage("tasks.evaluate", TRIAL)
    weights.unlink()
    weights.write_bytes(original)
    assert "reference/eval: stale reference cache, refused: weights differ" in output


def test_unknown_key_in_params_is_an_error_without_a_traceback(project, run_stage):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("eval_fraction: 0.1", "eval_fractoin: 0.1"))
    outputs = [execute(project, sys.executable, "-m", "tasks.ingest", fails=True), run_stage("tasks.sft")]
    (project / "params.yaml").write_text(text)
    for output in outputs:
        assert "params.yaml: data.eval_fractoin: unknown key" in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_flow_gives_the_same_results_as_dvc_repro(tmp_path, tiny_model_dir):
    folder = make_project(tmp_path, tiny_model_dir)
    ENV["PREFECT_HOME"] = str(tmp_path / "prefect")
    execute(folder, sys.executable, "-m", "flows.pipeline")
    assert (folder / "reports/index.html").is_file()
    assert stages_run(execute(folder, "dvc", "repro")) == []


def copy_for_two_processes(project, folder, config):
    """Copy a project and add two.yaml, a configuration for two processes. Return the copy and its metrics."""
    copy = shutil.copytree(project, folder, symlinks=True)
    text = (ROOT / f"configs/{config}.yaml").read_text()
    (copy / "two.yaml").write_text(f"{text.replace('processes: 8', 'processes: 2')}main_process_port: 0\n")
    return copy, json.loads((copy / f"metrics/evaluate/{TRIAL}.json").read_text())


@pytest.mark.slow
def test_run_launch_starts_several_processes_and_keeps_the_metrics(project, tmp_path):
    copy, before = copy_for_two_processes(project, tmp_path / "copy", "one-node-ddp")
    log = pd.read_csv(copy / f"metrics/train/{TRIAL}.csv")
    change(copy, {"run.launch": "two.yaml"})
    assert execute(copy, "dvc", "status").strip().endswith("up to date."), "run settings change no results"
    for stage in ("train", "evaluate"):
        output = execute(copy, sys.executable, "-m", f"tasks.{stage}", TRIAL)
    assert output.count("policy log-probs: 100%") >= 2, "both processes must compute a part"
    shared = pd.read_csv(copy / f"metrics/train/{TRIAL}.csv")
    pd.testing.assert_frame_equal(shared.drop(columns="epoch"), log.drop(columns="epoch"), rtol=1e-3, atol=1e-4)
    metrics = json.loads((copy / f"metrics/evaluate/{TRIAL}.json").read_text())
    for name in ("margin", "loss", "chosen_reward", "perplexity"):
        assert metrics[name] == pytest.approx(before[name], rel=1e-3, abs=1e-4), name
    assert metrics["kl"] > 0
    assert len(pd.read_parquet(copy / f"samples/{TRIAL}.parquet")) == 8


@pytest.mark.slow
def test_all_stages_run_with_sharded_weights(project, tmp_path):
    copy, before = copy_for_two_processes(project, tmp_path / "copy", "one-node-fsdp")
    change(copy, {"run.launch": "two.yaml"})
    for stage in ("sft", "reference_logprobs", "reference_samples"):
        execute(copy, sys.executable, "-m", f"tasks.{stage}")
    for stage in ("train", "evaluate"):
        execute(copy, sys.executable, "-m", f"tasks.{stage}", TRIAL)
    metrics = json.loads((copy / f"metrics/evaluate/{TRIAL}.json").read_text())
    for name in ("margin", "loss", "chosen_reward", "perplexity"):
        assert metrics[name] == pytest.approx(before[name], rel=1e-2, abs=1e-3), name
    assert metrics["kl"] > 0
    assert not list((copy / ".training-progress").glob("**/checkpoint-*"))
