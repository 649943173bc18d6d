"""The whole pipeline on a tiny random model, through `dvc repro` as a user runs it."""

import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from huggingface_hub import ModelCard

from tests.support.project import ENV, ROOT, TRIAL, change, execute, make_project

LINEAGE = (sys.executable, "-m", "tasks.commands.cli", "lineage")
STAGES = ["fetch_model", "ingest", "validate", "sft", "reference_logprobs", "reference_samples"]


def ran(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Run once from nothing through DVC."""
    folder = make_project(tmp_path_factory.mktemp("project"), tiny_model_dir)
    output = execute(folder, "dvc", "repro")
    assert ran(output) == [*STAGES, f"train@{TRIAL}", f"evaluate@{TRIAL}", "compare"]
    return folder


def test_training_starts_at_margin_zero_and_loss_log_2_through_the_cache(project):
    log = pd.read_csv(project / f"metrics/train/{TRIAL}.csv")
    assert log["rewards/margins"].iloc[0] == 0.0
    assert log["rewards/chosen"].iloc[0] == 0.0
    assert log["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-7)
    assert log["rewards/margins"].iloc[-1] > 0.1


def test_evaluation_reports_every_headline_figure(project):
    metrics = json.loads((project / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert metrics["pairs"] == 16
    assert metrics["human_ceiling"] == 0.75
    assert 0 <= metrics["reward_accuracy"] <= 1
    assert metrics["margin_ci"][0] <= metrics["margin"] <= metrics["margin_ci"][1]
    assert metrics["kl"] > 0
    assert "win_rate" in metrics
    compared = json.loads((project / "metrics/comparison.json").read_text())["policies"][TRIAL]
    assert compared == metrics | {"signs": compared["signs"]}


def test_the_sft_checkpoint_is_a_plain_transformers_model(project):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("reference", TRIAL):
        AutoTokenizer.from_pretrained(project / "models" / name)
        AutoModelForCausalLM.from_pretrained(project / "models" / name)


def test_report_and_table_show_the_policy_and_the_choice(project):
    page = (project / "reports/index.html").read_text()
    comparison = json.loads((project / "metrics/comparison.json").read_text())
    for words in ("Reward against KL", "Say something about film", "Signs of failure", comparison["reason"]):
        assert words in page
    assert comparison["selected"] == TRIAL
    assert "<script src" not in page
    outside_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?http""", outside_scripts), "the page opens offline"
    table = execute(project, sys.executable, "-m", "tasks.commands.cli", "results")
    assert "reward accuracy" in table
    assert f"{TRIAL} has the highest win rate" in " ".join(table.split())
    assert "make mlflow" in table


def test_answers_and_margins_are_kept_beside_the_figures(project):
    samples = pd.read_parquet(project / f"samples/{TRIAL}.parquet")
    metrics = json.loads((project / f"metrics/evaluate/{TRIAL}.json").read_text())
    assert len(samples) == metrics["samples"] == 8
    assert samples["kl"].mean() == pytest.approx(metrics["kl"])
    assert samples["win"].mean() == pytest.approx(metrics["win_rate"])
    margins = pd.read_parquet(project / f"margins/{TRIAL}.parquet")
    assert margins["margin"].mean() == pytest.approx(metrics["margin"])
    assert {"frontier", "calibration", "slices", "tests"} <= {f.stem for f in (project / "metrics").glob("*.csv")}


def test_the_model_card_is_one_that_the_hub_reads(project):
    card = ModelCard.load(project / f"models/{TRIAL}.md")
    metrics = json.loads((project / f"metrics/evaluate/{TRIAL}.json").read_text())
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["reward_accuracy"] == metrics["reward_accuracy"]
    assert card.data.library_name == "transformers"
    assert metrics["weights"] in card.text


def test_a_checkpoint_and_a_model_in_mlflow_tell_what_made_them(project, tmp_path):
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


def test_the_policy_and_the_reference_are_models_in_mlflow_that_answer(project):
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


def test_mlflow_holds_the_sweep(project):
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


def test_same_seed_gives_the_same_checkpoint(project):
    weights = project / f"models/{TRIAL}/model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    execute(project, "dvc", "repro", "--force", "--single-item", f"train@{TRIAL}")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    again = ran(execute(project, "dvc", "repro"))
    assert again == [f"evaluate@{TRIAL}"], "its provenance names another run; its figures are the same"


def test_nothing_runs_twice_and_a_new_beta_runs_its_own_cells_only(project):
    assert ran(execute(project, "dvc", "repro")) == []
    other = TRIAL.replace("0.1", "0.5")
    change(project, {"sweep.betas": [0.1, 0.5]})
    assert ran(execute(project, "dvc", "repro")) == [f"train@{other}", f"evaluate@{other}", "compare"]
    assert "up to date" in execute(project, "dvc", "status")


def test_push_and_pull_bring_a_clean_clone_up_to_date(project, tmp_path):
    execute(project, "dvc", "remote", "add", "--default", "--local", "store", str(tmp_path / "store"))
    execute(project, "git", "add", "-A")
    execute(project, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "results")
    execute(project, "dvc", "push")
    clone = tmp_path / "clone"
    execute(tmp_path, "git", "clone", "-q", str(project), str(clone))
    execute(clone, "dvc", "remote", "add", "--default", "--local", "store", str(tmp_path / "store"))
    execute(clone, "dvc", "pull")
    assert ran(execute(clone, "dvc", "repro")) == []
    assert "up to date" in execute(clone, "dvc", "status")


@pytest.mark.parametrize(("stage", "split"), [("train", "train"), ("evaluate", "eval")])
def test_a_stale_reference_cache_is_refused(project, stage, split):
    manifest = project / f"reference/{split}/manifest.json"
    original = manifest.read_text()
    manifest.write_text(original.replace('"max_length": 128', '"max_length": 127'))
    output = execute(project, sys.executable, "-m", f"tasks.{stage}", TRIAL, fails=True)
    manifest.write_text(original)
    assert f"reference/{split}: stale reference cache, refused: max_length differ" in output
    assert "Traceback" not in output


def test_a_policy_is_never_its_own_reference(project):
    weights = project / "models/reference/model.safetensors"
    original = weights.read_bytes()
    weights.unlink()
    shutil.copy(project / f"models/{TRIAL}/model.safetensors", weights)
    output = execute(project, sys.executable, "-m", "tasks.evaluate", TRIAL, fails=True)
    weights.unlink()
    weights.write_bytes(original)
    assert "reference/eval: stale reference cache, refused: weights differ" in output


def test_bad_params_stop_a_stage_with_one_line(project):
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("eval_fraction: 0.1", "eval_fractoin: 0.1"))
    outputs = [
        execute(project, sys.executable, "-m", stage, fails=True) for stage in ("tasks.ingest", "tasks.sft")
    ]
    (project / "params.yaml").write_text(text)
    for output in outputs:
        assert "params.yaml: data.eval_fractoin: unknown key" in output
        assert "Traceback" not in output


def test_through_prefect(tmp_path, tiny_model_dir):
    folder = make_project(tmp_path, tiny_model_dir)
    ENV["PREFECT_HOME"] = str(tmp_path / "prefect")
    execute(folder, sys.executable, "-m", "flows.pipeline")
    assert (folder / "reports/index.html").is_file()
    assert ran(execute(folder, "dvc", "repro")) == []


def test_stages_run_in_the_processes_that_run_launch_asks_for(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy", symlinks=True)
    eight = (ROOT / "configs/one-node-ddp.yaml").read_text()
    (copy / "both.yaml").write_text(f"{eight.replace('processes: 8', 'processes: 2')}main_process_port: 0\n")
    before = json.loads((copy / f"metrics/evaluate/{TRIAL}.json").read_text())
    log = pd.read_csv(copy / f"metrics/train/{TRIAL}.csv")
    change(copy, {"run.launch": "both.yaml"})
    assert execute(copy, "dvc", "status").strip().endswith("up to date."), "a way to run makes nothing stale"
    for stage in ("train", "evaluate"):
        output = execute(copy, sys.executable, "-m", f"tasks.{stage}", TRIAL)
    assert output.count("policy log-probs: 100%") >= 2, "both processes did a share"
    shared = pd.read_csv(copy / f"metrics/train/{TRIAL}.csv")
    pd.testing.assert_frame_equal(shared.drop(columns="epoch"), log.drop(columns="epoch"), rtol=1e-3, atol=1e-4)
    metrics = json.loads((copy / f"metrics/evaluate/{TRIAL}.json").read_text())
    for figure in ("margin", "loss", "chosen_reward", "perplexity"):
        assert metrics[figure] == pytest.approx(before[figure], rel=1e-3, abs=1e-4), figure
    assert metrics["kl"] > 0
    assert len(pd.read_parquet(copy / f"samples/{TRIAL}.parquet")) == 8
