"""The manifest of docs/operations/kubernetes.md, and the loop that starts a job for each trial."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

PAGE = (Path(__file__).parents[2] / "docs/operations/kubernetes.md").read_text()
STAGES = [
    f"{stage}@{trial}"
    for trial in ("sigmoid-0.1-7e-05-17", "length_normalised-5.0-1e-06-18")
    for stage in ("fetch_model", "train", "evaluate")
] + ["train_reference_free@simpo-2.0-1e-06-17", "evaluate_reference_free@simpo-2.0-1e-06-17", "compare"]


@pytest.fixture
def jobs(tmp_path):
    """Run the loop with stand-ins for `dvc` and `kubectl`, and return the jobs that it starts."""
    (manifest,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (loop,) = [block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if block.startswith("for ")]
    (tmp_path / "trial.yaml").write_text(manifest)
    for name, script in {
        "dvc": f"printf '%s\\n' {' '.join(STAGES)}",
        "kubectl": '[ "$1" = wait ] || { cat; echo ---; } >> started.yaml',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-ec", loop], cwd=tmp_path, env=env, check=True)
    return [job for job in yaml.safe_load_all((tmp_path / "started.yaml").read_text()) if job]


def test_each_trial_has_one_job_with_a_valid_name_and_both_stages(jobs):
    found = {
        job["metadata"]["name"]: job["spec"]["template"]["spec"]["containers"][0]["command"][4:] for job in jobs
    }
    assert found == {
        "sigmoid-0.1-7e-05-17": ["train@sigmoid-0.1-7e-05-17", "evaluate@sigmoid-0.1-7e-05-17"],
        "length-normalised-5.0-1e-06-18": [
            "train@length_normalised-5.0-1e-06-18",
            "evaluate@length_normalised-5.0-1e-06-18",
        ],
        "simpo-2.0-1e-06-17": [
            "train_reference_free@simpo-2.0-1e-06-17",
            "evaluate_reference_free@simpo-2.0-1e-06-17",
        ],
    }
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name) for name in found)


def test_no_volume_is_shared_between_jobs(jobs):
    volumes = [volume for job in jobs for volume in job["spec"]["template"]["spec"]["volumes"]]
    assert all(set(volume) == {"name", "emptyDir"} for volume in volumes)


@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="needs kubernetes-validate")
def test_the_jobs_are_valid_for_the_api_of_kubernetes(jobs):
    import kubernetes_validate

    for job in jobs:
        kubernetes_validate.validate(job, "1.30", strict=True)
