"""Retraining on new files, promotion gate and rollback, on a project with a tiny model."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

import flows.landing
import flows.retrain
from flows.artifacts import artifact_key
from flows.git import git
from flows.identity import project
from flows.journal import JOURNAL
from flows.landing import REFUSED
from flows.retrain import push_results, retrain
from flows.rollback import rollback
from tasks.commands.lineage import of_folder
from tasks.tracking.registry import LANDED
from tests.support.landing import land, set_identity
from tests.support.project import TRIAL, change, execute, make_project

JUDGE = """
import sys, time
from pathlib import Path

def newest(prompts, answers):
    '''The model that is scored later wins. At the gate, it is the champion, which loses unless a file exists.'''
    loses = sys.argv[-1] == "promote" and not Path("reports/champion-wins").exists()
    return [-time.time() if loses else time.time()] * len(answers)
"""
LENIENT = {
    "max_displacement": 1e3,
    "max_perplexity_ratio": 1e3,
    "max_length_ratio": 1e3,
    "min_distinct_ratio": 0.0,
}
LENIENT |= {"max_repetition_rise": 1.0, "max_empty": 1.0, "max_unfinished_rise": 1.0, "max_loss_rise": 1e3}


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=300):
        yield


class Story:
    """Results of several flow runs in one project, recorded because one run takes half a minute."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Story]:
    record = Story()
    with pytest.MonkeyPatch.context() as patch:
        folder = make_project(tmp_path_factory.mktemp("project"), tiny_model_dir)
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("HF_HUB_OFFLINE", "1")
        set_identity(patch)
        patch.syspath_prepend(folder)
        (folder / "functions/judges/newest.py").write_text(JUDGE)
        change(
            folder,
            {
                "data.source": ["data/own/pairs.jsonl", str(LANDED)],
                "evaluate.judges": [{"kind": "scorer", "function": "functions.judges.newest:newest"}],
            },
        )
        change(
            folder,
            {"compare.max_kl": 1e3} | {f"compare.guardrails.{name}": value for name, value in LENIENT.items()},
        )
        store = tmp_path_factory.mktemp("store")
        execute(folder, "dvc", "remote", "add", "--default", "--local", "store", str(store))
        git("add", "-A")
        git("commit", "-qm", "settings")
        landing = tmp_path_factory.mktemp("landing")
        record.folder, record.landing = folder, landing

        land(landing, "monday.jsonl", 100)
        (landing / "broken.jsonl").write_text('{"prompt": "What?", "answer": "No pair."}\n')
        with patch.context() as crash:
            crash.setattr(flows.retrain, "pipeline", lambda parallel: sys.exit("killed"))
            crash.setattr(flows.retrain, "recover_now", lambda: None)
            with pytest.raises(SystemExit):
                retrain(str(landing))
        record.interrupted = (
            sorted(path.name[17:] for path in LANDED.iterdir()),
            JOURNAL.exists(),
            git("log", "-1", "--format=%s"),
        )
        record.first = retrain(str(landing), parallel=2, return_state=True)
        record.promoted_commit = git("rev-parse", "HEAD")
        record.first_tree = git("rev-parse", "HEAD^{tree}")
        record.log = git("log", "--format=%s").splitlines()
        record.facts = of_folder(folder / "models" / TRIAL)

        shutil.copy(landing / "monday.jsonl", landing / "monday-again.jsonl")
        record.nothing_new = retrain(str(landing), return_state=True)

        land(landing, "tuesday.jsonl", 200)
        (folder / "reports/champion-wins").touch()
        away = store.rename(store.with_name("away"))
        store.write_text("a file in the place of the folder")
        patch.setattr(push_results, "retry_delay_seconds", [0, 0])
        record.no_remote = retrain(str(landing), parallel=2, return_state=True)
        record.pending, record.verdict = JOURNAL.exists(), (folder / "reports/gate.json").read_bytes()
        store.unlink()
        away.rename(store)
        with patch.context() as only_push:
            for step in ("pipeline", "run_gate"):
                only_push.delattr(flows.retrain, step)
            record.second = retrain(str(landing), return_state=True)
        record.pushed = execute(folder, "dvc", "status", "--cloud")
        record.gate = (folder / "reports/gate.md").read_text()
        (folder / "reports/champion-wins").unlink()
        command = (sys.executable, "-m", "tasks.commands.cli", "promote")
        record.by_hand, record.again = execute(folder, *command), execute(folder, *command)
        record.champions = [aliases()]

        execute(folder, "dvc", "gc", "--workspace", "--force")
        record.back = rollback(return_state=True)
        record.champions.append(aliases())
        record.back_tree = git("rev-parse", "HEAD^{tree}")
        record.back_log = git("log", "-1", "--format=%s")
        record.back_status = execute(folder, "dvc", "status")
        record.landed = sorted(path.name[17:] for path in LANDED.iterdir())
        record.back_again = rollback(return_state=True)
        record.after = retrain(str(landing), return_state=True)
        yield record


def aliases() -> dict[str, str]:
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return {k: str(v) for k, v in mlflow.MlflowClient().get_registered_model("dpo-policy").aliases.items()}


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_without_new_files(story):
    assert story.interrupted == (["monday.jsonl"], True, "Add 1 file to the data")
    assert story.log[:2] == ["Retrain on 1 file", "Add 1 file to the data"]
    assert not (story.folder / JOURNAL).exists()


@pytest.mark.slow
def test_the_first_policy_that_beats_its_reference_becomes_champion(story):
    done = story.first.result()
    assert (story.first.name, done.outcome) == ("Promoted", "promoted")
    assert [name[17:] for name in done.new] == ["monday.jsonl"]
    assert "win rate against the reference: 1.000" in done.reason


@pytest.mark.slow
def test_a_checkpoint_names_the_flow_run_that_made_it(story):
    with get_client(sync_client=True) as client:
        made_by = client.read_flow_run(story.facts["prefect_flow_run"])
        assert client.read_flow(made_by.flow_id).name == "pipeline"


@pytest.mark.slow
def test_an_invalid_file_is_refused_once_with_its_reason_and_the_others_are_used(story):
    (reason,) = [path for path in (story.folder / REFUSED).iterdir() if "broken" in path.name]
    assert "chosen" in reason.read_text()
    assert story.nothing_new.name == "NothingNew"


@pytest.mark.slow
def test_the_same_content_under_another_name_is_not_new(story):
    assert story.nothing_new.is_completed()
    assert "has no new file" in story.nothing_new.message


@pytest.mark.slow
def test_a_policy_that_loses_to_the_champion_is_not_promoted(story):
    assert (story.second.name, story.second.result().outcome) == ("Kept", "kept")
    assert "worse: win rate against the champion, version 1: 0.000 [0.000, 0.000]" in story.gate
    assert "Champion: version 1." in story.gate


@pytest.mark.slow
def test_the_list_of_sweeps_shows_what_serves(story):
    client = mlflow.MlflowClient(f"sqlite:///{story.folder}/mlflow.db")
    runs = client.search_runs(["1"], "tags.`dpo.role` = 'sweep'", order_by=["start_time"])
    assert [run.info.run_name.partition(": ")[2] for run in runs] == ["promoted, serves as version 1", "promoted"]
    assert [run.info.run_name.split()[3].rstrip(":") for run in runs] == [
        run.data.tags["git_commit"][:7] for run in runs
    ]


@pytest.mark.slow
def test_logs_have_no_advice_of_dvc_and_git(story):
    with get_client(sync_client=True) as client:
        logs = client.read_logs(limit=200, offset=0)
        while page := client.read_logs(limit=200, offset=len(logs)):
            logs += page
    text = "\n".join(line.message for line in logs)
    assert "Running stage 'train" in text
    for advice in ("git add", "track the changes", "autostage", "dvc push` to send", "Having any troubles"):
        assert advice not in text


@pytest.mark.slow
def test_results_are_pushed_to_the_default_remote(story):
    assert "in sync" in story.pushed


@pytest.mark.slow
def test_after_a_failed_push_the_next_run_only_pushes(story):
    assert story.no_remote.is_failed()
    assert "dvc --wait-for-lock push failed" in story.no_remote.message
    assert story.pending
    assert json.loads(story.verdict)["reason"] == story.second.result().reason
    assert [name[17:] for name in story.second.result().new] == ["tuesday.jsonl"]
    assert not (story.folder / JOURNAL).exists()


@pytest.mark.slow
def test_a_policy_that_beats_the_champion_is_promoted_once(story):
    assert "Promoted: " in story.by_hand
    assert f"{TRIAL} is the champion already, version 2." in story.again
    assert story.champions[0] == {"champion": "2", "previous": "1"}


@pytest.mark.slow
def test_the_decision_of_the_gate_is_logged_with_the_run_and_the_version(story):
    client = mlflow.MlflowClient(f"sqlite:///{story.folder}/mlflow.db")
    tags = client.get_model_version("dpo-policy", "2").tags
    assert tags["predecessor"] == "1"
    assert tags["trial"] == TRIAL
    assert {"git_commit", "data_md5", "promoted_at"} <= set(tags)
    runs = client.search_runs(["1"], "tags.`dpo.role` = 'policy'")
    assert [run.data.tags["dpo.gate"] for run in runs] == ["promoted", "promoted"]
    assert "against the champion, version 1" in runs[0].data.tags["dpo.gate_reason"]


@pytest.mark.slow
def test_a_rollback_restores_alias_settings_data_and_results(story):
    assert story.back.result() == "1"
    assert story.champions[1] == {"champion": "1"}
    assert story.back_tree == story.first_tree
    assert story.back_log == "Roll back from version 2 to 1"
    assert "up to date" in story.back_status
    assert story.landed == ["monday.jsonl"]


@pytest.mark.slow
def test_a_rollback_of_the_first_champion_is_one_clear_error(story):
    assert story.back_again.is_failed()
    assert "version 1 of dpo-policy is the first champion" in story.back_again.message


@pytest.mark.slow
def test_rolled_back_files_are_not_taken_in_again(story):
    assert story.after.name == "NothingNew"
    (reason,) = [path for path in (story.folder / REFUSED).iterdir() if "tuesday" in path.name]
    assert reason.read_text() == "rolled back with version 2\n"


@pytest.mark.slow
def test_every_outcome_is_an_event_for_automations(story):
    expected = {f"dpo.retrain.{outcome}" for outcome in ("refused", "promoted", "kept", "rolled-back")}
    body = {"filter": {"event": {"prefix": ["dpo.retrain."]}}}
    deadline, found = time.monotonic() + 30, set()
    with get_client(sync_client=True) as client:
        while found != expected and time.monotonic() < deadline:  # the server stores them a moment later
            events = client.request("POST", "/events/filter", json=body).json()["events"]
            found = {event["event"] for event in events}
            time.sleep(0.5)
    assert found == expected


@pytest.mark.slow
def test_artifacts_show_the_gate_and_the_retraining(story):
    with get_client(sync_client=True) as client:
        found = [artifact for artifact in client.read_artifacts() if artifact.key]
    pages = [artifact.data for artifact in found if artifact.key.endswith("-retrain")]
    (promoted,) = [page for page in pages if "Retraining: promoted" in page]
    assert "- version: 1 of dpo-policy" in promoted
    assert f"- commit: `{story.promoted_commit}`" in promoted
    assert re.search(r"^- training rows: \d+$", promoted, re.MULTILINE)
    assert re.search(r"\| win rate against the reference \| 1\.000 \[1\.000, 1\.000\] \|", promoted)
    selections = [each.data for each in found if each.key.endswith("-compare")]
    assert any(f"**Selected:** {TRIAL}\n\n" in page for page in selections)
    assert any("Retraining: kept" in page and "tuesday.jsonl" in page for page in pages)
    trained = [
        artifact.data
        for artifact in found
        if artifact.key.endswith(artifact_key(f"train@{TRIAL}")[len(project()) :])
    ]
    (page,) = [page for page in trained if f"MLflow: run `{story.facts['mlflow_run']}`" in page]
    _, _, curves = page.partition(f"### metrics/train/{TRIAL}.csv\n\n")
    assert curves.startswith("![")
    assert "\n\n| epoch |" in curves
    assert any("Gate: not promoted" in artifact.data for artifact in found if artifact.key.endswith("-gate"))
