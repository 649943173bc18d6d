"""Recovery of retraining and rollback: real git, DVC and MLflow, with stages that only copy files."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.support.checkout import Checkout, write
from tests.support.prefect_server import prefect_server
from tests.support.project import book_pairs, change


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture
def checkout(tmp_path: Path, server: str) -> Checkout:
    return Checkout(tmp_path, server)


@pytest.mark.slow
def test_a_run_that_fails_restores_all_and_is_retried(checkout):
    write(checkout.landing / "monday.jsonl", book_pairs(0, 8))
    assert "Kept" in checkout.flow()
    write(checkout.landing / "tuesday.jsonl", book_pairs(10, 8))
    before = checkout.state()
    assert "the stage is broken" in checkout.flow(code=1, STAGE="broken")
    assert checkout.state() == before
    checkout.flow()
    assert checkout.landed() == ["monday.jsonl", "tuesday.jsonl"]
    assert checkout.subjects()[:2] == ["Retrain on 1 file", "Add 1 file to the data"]
    assert len(checkout.subjects()) == 5


def slow(*points: str) -> object:
    return pytest.param(points, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "points",
    [
        ("after the commit of the data", "after the gate"),
        slow("before dvc add", "before the commit of the results"),
        slow("after the commit of the results", "in the push"),
    ],
)
def test_a_killed_retraining_is_undone_or_completed(checkout, points):
    write(checkout.landing / "monday.jsonl", book_pairs(0, 8))
    for point in points:
        checkout.flow(point=point, code=-signal.SIGKILL)
        (checkout.folder / ".git/index.lock").touch()
    checkout.flow()
    assert checkout.landed() == ["monday.jsonl"]
    assert checkout.subjects() == ["Retrain on 1 file", "Add 1 file to the data", "start"]
    assert "up to date" in checkout.run("dvc", "status")
    assert checkout.run("git", "status", "--porcelain") == ""
    assert not list((checkout.folder / ".retrain/incoming").iterdir())
    assert not (checkout.folder / ".retrain/journal.json").exists()


@pytest.fixture
def promoted(checkout: Checkout) -> Checkout:
    """A checkout whose champion is version 2, with version 1 as its predecessor, and its state at version 1."""
    registry = MlflowClient(f"sqlite:///{checkout.folder}/mlflow.db")
    for number, name in enumerate(("monday", "tuesday"), 1):
        write(checkout.landing / f"{name}.jsonl", book_pairs(10 * number, 8))
        checkout.flow()
        head = checkout.run("git", "rev-parse", "HEAD").strip()
        tags = {"git_commit": head, "predecessor": str(number - 1) if number > 1 else "none"}
        if number == 1:
            checkout.first = checkout.state()
            registry.create_registered_model("dpo-policy")
        registry.create_model_version("dpo-policy", str(checkout.folder / "models/policy"), tags=tags)
        registry.set_registered_model_alias("dpo-policy", "champion", str(number))
    return checkout


def champion(checkout: Checkout) -> str:
    registry = MlflowClient(f"sqlite:///{checkout.folder}/mlflow.db")
    return str(registry.get_model_version_by_alias("dpo-policy", "champion").version)


def assert_rolled_back(checkout: Checkout) -> None:
    assert champion(checkout) == "1"
    assert checkout.state()["files"] == checkout.first["files"]
    assert checkout.run("git", "status", "--porcelain") == ""
    assert checkout.subjects()[:2] == ["Roll back from version 2 to 1", "Retrain on 1 file"]
    assert checkout.refused()["tuesday.jsonl.txt"] == "rolled back with version 2\n"


@pytest.mark.parametrize("points", [("before the checkout", "before the alias"), slow("after the alias")])
def test_a_killed_rollback_is_completed_by_the_next_one(promoted, points):
    for point in points:
        promoted.flow("rollback", point=point, code=-signal.SIGKILL)
    promoted.flow("rollback")
    assert_rolled_back(promoted)


@pytest.mark.slow
def test_a_killed_rollback_is_completed_by_the_next_retraining(promoted):
    promoted.flow("rollback", point="before the checkout", code=-signal.SIGKILL)
    promoted.flow()
    assert_rolled_back(promoted)


@pytest.mark.slow
def test_a_rollback_works_after_a_failed_and_a_killed_run_and_keeps_uncommitted_changes(promoted):
    write(promoted.landing / "wednesday.jsonl", book_pairs(100, 8))
    promoted.flow(code=1, STAGE="broken")
    promoted.flow(point="before the commit of the results", code=-signal.SIGKILL)
    change(promoted.folder, {"sweep.betas": [0.7]})
    promoted.flow("rollback")
    assert_rolled_back(promoted)
    assert "0.7" in promoted.run("git", "stash", "show", "-p")


@pytest.mark.slow
def test_a_rollback_without_its_data_changes_nothing(promoted):
    before = promoted.state()
    shutil.rmtree(promoted.folder / ".dvc/cache")
    assert "missing in DVC's cache" in promoted.flow("rollback", code=1)
    assert promoted.state() == before
    assert champion(promoted) == "2"


@pytest.mark.slow
def test_sigterm_undoes_the_run_and_reports_it_as_cancelled(checkout):
    write(checkout.landing / "monday.jsonl", book_pairs(0, 8))
    before = checkout.state()
    command = [sys.executable, "flow.py", "none", "retrain", str(checkout.landing)]
    log = (checkout.folder.parent / "log").open("w+")
    env = {**checkout.env, "STAGE": "waits"}
    process = subprocess.Popen(command, cwd=checkout.folder, env=env, stdout=log, stderr=log)
    started = checkout.folder / "models/started"
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    assert "Cancelled" in (checkout.folder.parent / "log").read_text()
    started.unlink()
    assert checkout.state() == before


@pytest.mark.slow
def test_repeated_rows_are_dropped_and_counted(checkout):
    write(checkout.landing / "monday.jsonl", book_pairs(0, 8))
    checkout.flow()
    write(checkout.landing / "export.jsonl", pd.concat([book_pairs(0, 8), book_pairs(10, 8)]))
    output = checkout.flow()
    assert "1 file new, 0 files refused, 8 rows in the data already" in output
    assert len((next((checkout.folder / "data/own/landed").glob("*export*"))).read_text().splitlines()) == 8
    write(checkout.landing / "again.jsonl", book_pairs(0, 4))
    assert "the data has all 4 rows of the files already" in checkout.flow()
    assert checkout.landed() == ["export.jsonl", "monday.jsonl"]


@pytest.mark.slow
def test_only_the_files_with_faults_are_refused(checkout):
    change(checkout.folder, {"validate.rules": {"length_bias": "error"}})
    checkout.run("git", "commit", "-qam", "settings")
    write(checkout.landing / "monday.jsonl", book_pairs(0, 20))
    longer = book_pairs(50, 30).assign(
        chosen=lambda table: table["chosen"] + " And more words that make it longer."
    )
    write(checkout.landing / "longer.jsonl", longer)
    swapped = book_pairs(0, 20).rename(columns={"chosen": "rejected", "rejected": "chosen"})
    write(checkout.landing / "swapped.jsonl", swapped)
    (checkout.landing / "broken.jsonl").write_text('{"prompt": "What?", "answer": "No pair."}\n')
    os.mkfifo(checkout.landing / "pipe.jsonl")
    (checkout.landing / "link.jsonl").symlink_to("nowhere")
    write(checkout.landing / f"{'n' * 240}.jsonl", book_pairs(70, 8))
    checkout.flow()
    refused = checkout.refused()
    assert checkout.landed() == ["monday.jsonl"]
    assert "length_bias" in refused["longer.jsonl.txt"]
    assert f"{checkout.landing}/swapped.jsonl, line " in refused["swapped.jsonl.txt"]
    assert f"{checkout.landing}/broken.jsonl: " in refused["broken.jsonl.txt"]
    assert "not a regular file" in refused["pipe.jsonl.txt"]
    assert "cannot be read: No such file" in refused["link.jsonl.txt"]
    assert sum("more than 200 bytes" in reason for reason in refused.values()) == 1
    assert "NothingNew" in checkout.flow()
    change(checkout.folder, {"validate.rules": {"length_bias": "warn"}})
    checkout.run("git", "commit", "-qam", "settings")
    assert "1 file new, 0 files refused" in checkout.flow()
    assert checkout.landed() == ["longer.jsonl", "monday.jsonl"]


@pytest.mark.slow
def test_a_fault_of_settings_refuses_no_file(checkout):
    write(checkout.landing / "monday.jsonl", book_pairs(0, 8))
    checkout.flow()
    write(checkout.landing / "tuesday.jsonl", book_pairs(10, 8))
    change(checkout.folder, {"data.columns": {"prompt": "question"}})
    checkout.run("git", "commit", "-qam", "settings")
    before = checkout.state()
    checkout.flow(code=1)
    assert checkout.state() == before
    assert checkout.refused() == {}
    checkout.run("git", "revert", "--no-edit", "HEAD")
    checkout.flow()
    assert checkout.landed() == ["monday.jsonl", "tuesday.jsonl"]


@pytest.mark.slow
def test_limits_of_size_and_time_refuse_one_file(checkout):
    change(checkout.folder, {"run.landed_mib": 0.01})
    checkout.run("git", "commit", "-qam", "settings")
    write(checkout.landing / "large.jsonl", book_pairs(100, 200))
    book_pairs(100, 200).to_json(checkout.landing / "packed.jsonl.gz", orient="records", lines=True)
    write(checkout.landing / "small.jsonl", book_pairs(0, 8))
    checkout.flow()
    assert checkout.landed() == ["small.jsonl"]
    assert "larger than 0.01 MiB" in checkout.refused()["large.jsonl.txt"]
    assert "more than 0.01 MiB" in checkout.refused()["packed.jsonl.gz.txt"]


@pytest.mark.slow
def test_thousands_of_files_are_taken_in_by_one_run(checkout):
    for number in range(2000):
        write(checkout.landing / f"{number}.jsonl", book_pairs(2 * number, 2))
    for number in range(5):
        (checkout.landing / f"broken-{number}.jsonl").write_text(f'{{"prompt": "What?", "answer": {number}}}\n')
    assert "2000 files new, 5 files refused" in checkout.flow()
    assert len(checkout.landed()) == 2000
    assert len(checkout.refused()) == 5
    assert len(checkout.run("git", "log", "-1", "--format=%b").split()) == 2000
    assert "NothingNew" in checkout.flow()


@pytest.mark.slow
def test_other_branches_and_a_detached_head_are_refused(checkout):
    write(checkout.landing / "monday.jsonl", book_pairs(0, 8))
    checkout.run("git", "switch", "--quiet", "--detach")
    assert "HEAD is detached" in checkout.flow(code=1)
    checkout.run("git", "switch", "--quiet", "main")
    checkout.flow(point="after the commit of the data", code=-signal.SIGKILL)
    checkout.run("git", "switch", "--quiet", "--create", "other", "HEAD~1")
    assert "on branch main is unfinished, not on other; `git switch main`" in checkout.flow(code=1)
