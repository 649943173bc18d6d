"""A sweep of a tiny model on two machines with an S3 server: weights equal those of a run in one checkout."""

import shutil
import time
from functools import partial
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.machines import S3_ENV, Machines, add_s3_remote, s3_server
from tests.support.project import change, execute, make_project
from tests.support.results import result_hashes

for package in ("dvc_s3", "moto", "flask"):
    pytest.importorskip(package, reason=f"{package}: installed with the dev extra")

FOUR, TWO = [0.05, 0.1, 0.2, 0.5], [0.3, 0.4]
OUTAGE_SECONDS = 60


def trial(beta: float) -> str:
    return f"sigmoid-{beta}-0.01-17"


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model_dir: Path) -> Path:
    """Train all trials in one checkout."""
    folder = make_project(tmp_path_factory.mktemp("alone") / "project", tiny_model_dir)
    change(folder, {"sweep.betas": FOUR + TWO})
    execute(folder, "dvc", "repro", *(f"train@{trial(beta)}" for beta in FOUR + TWO))
    return folder


@pytest.fixture(scope="module")
def s3():
    with s3_server("results") as line:
        yield line


@pytest.fixture(scope="module")
def machines(tmp_path_factory, tiny_model_dir: Path, s3):
    def fill(head: Path) -> None:
        make_project(head, tiny_model_dir)
        change(head, {"sweep.betas": FOUR})

    place = tmp_path_factory.mktemp("machines")
    made = Machines(place, fill, partial(add_s3_remote, port=s3.port), **S3_ENV)
    try:
        for name in ("one", "two"):
            made.start_worker(name)
        yield made
    finally:
        made.close()


def trained(machines: Machines, *names: str) -> int:
    """Return how often a policy was trained below the workers of these names."""
    return sum(machines.log(name).count("Running stage 'train@") for name in names)


def assert_equal_to_one_checkout(folder: Path, alone: Path, betas: list[float]) -> None:
    patterns = [f"models/{trial(beta)}/*" for beta in betas]
    expected = result_hashes(alone, patterns)
    assert sum(name.endswith(".safetensors") for name in expected) == len(betas)
    assert result_hashes(folder, patterns) == expected
    assert all((folder / f"metrics/evaluate/{trial(beta)}.json").is_file() for beta in betas)
    assert "up to date" in execute(folder, "dvc", "status")


def wait_for_training(machines: Machines) -> str:
    """Return the name of a worker that trains, as soon as there is one."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for name in ("one", "two"):
            if machines.stages_running(name, "tasks.train"):
                return name
        time.sleep(0.1)
    raise AssertionError("no training started")


def forget_trials(folder: Path, betas: list[float]) -> None:
    """Remove what a checkout and its DVC cache have of these trials, so that only DVC's remote has it."""
    yaml, names = YAML(), [trial(beta) for beta in betas]
    lock = yaml.load(folder / "dvc.lock")
    for stage in list(lock["stages"]):
        if stage.partition("@")[2] in names:
            del lock["stages"][stage]
    yaml.dump(lock, folder / "dvc.lock")
    for name in names:
        shutil.rmtree(folder / "models" / name)
        for file in [*folder.glob(f"*/{name}.*"), *folder.glob(f"metrics/*/{name}.*")]:
            file.unlink()
    execute(folder, "dvc", "gc", "--workspace", "--force")
    shutil.rmtree(folder / ".dvc/cache/runs")


@pytest.mark.slow
def test_a_machine_that_is_lost_while_it_trains_changes_no_weights(machines, alone):
    flow = machines.begin_sweep()
    lost = wait_for_training(machines)
    machines.kill_worker(lost)
    output = machines.finish(flow)
    machines.start_worker(lost)
    (other,) = {"one", "two"} - {lost}
    assert "no sign of life" in output
    assert trained(machines, other) >= 3, "the other machine takes over"
    assert_equal_to_one_checkout(machines.head, alone, FOUR)


@pytest.mark.slow
def test_storage_that_is_unreachable_for_a_minute_changes_no_weights(machines, alone, s3):
    change(machines.head, {"sweep.betas": TWO})
    flow = machines.begin_sweep()
    wait_for_training(machines)
    s3.cut()
    time.sleep(OUTAGE_SECONDS)
    s3.restore()
    machines.finish(flow)
    assert_equal_to_one_checkout(machines.head, alone, TWO)


@pytest.mark.slow
def test_a_second_sweep_over_the_same_trials_restores_all(machines, alone):
    change(machines.head, {"sweep.betas": FOUR})
    machines.sweep()
    forget_trials(machines.head, FOUR)
    before = trained(machines, "one", "two")
    output = machines.sweep()
    assert trained(machines, "one", "two") == before
    assert "Running stage 'train@" not in output
    assert "Running stage 'evaluate@" not in output
    assert_equal_to_one_checkout(machines.head, alone, FOUR)
