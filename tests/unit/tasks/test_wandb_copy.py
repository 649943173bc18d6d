"""The copy of MLflow's runs in W&B; the last test needs the package wandb."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo.common.errors import InputError
from tasks.tracking import wandb_copy
from tasks.tracking.run_logger import metric_points
from tasks.tracking.wandb_copy import WandbCopy

RUN = "0123456789abcdef"


class Run:
    """What the copy uses of a run of W&B."""

    def __init__(self, **options):
        self.options, self.logged, self.summary, self.ended = options, [], {}, None
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.settings.update(values))
        self.settings = {}

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Replace the package wandb; return the runs that are created."""
    made = []
    package = SimpleNamespace(
        init=lambda **options: made.append(Run(**options)) or made[-1],
        Settings=lambda **values: values,
        Error=ConnectionError,
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setenv("WANDB_PROJECT", "films")
    monkeypatch.setattr(
        wandb_copy.mlflow,
        "get_run",
        lambda run_id: SimpleNamespace(
            info=SimpleNamespace(run_name="sigmoid-0.1"),
            data=SimpleNamespace(tags={"dpo.sweep": "a", "dpo.role": "policy"}),
        ),
    )
    yield made
    wandb_copy._run.cache_clear()


def test_nothing_is_copied_without_a_project(runs, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT")
    copy = WandbCopy(RUN)
    copy.log_params({"beta": 0.1})
    copy.log_metrics(metric_points({"loss": 0.5}, 1))
    copy.close("FINISHED")
    assert runs == []


def test_steps_become_curves_and_figures_without_a_step_the_summary(runs):
    copy = WandbCopy(RUN)
    WandbCopy(RUN).log_params({"beta": 0.1, "betas": [1, 2]})
    copy.log_metrics([*metric_points({"loss": 0.5, "margin": 1}, 1), *metric_points({"loss": 0.4}, 2)])
    copy.log_metrics(metric_points({"eval/kl": 3.0}))
    (run,) = runs
    assert {"id": RUN, "name": "sigmoid-0.1", "group": "a", "job_type": "policy"}.items() <= run.options.items()
    assert run.settings == {"beta": "0.1", "betas": "[1, 2]"}
    assert run.logged == [(1, {"loss": 0.5, "margin": 1}), (2, {"loss": 0.4})]
    assert run.summary == {"eval/kl": 3.0}
    copy.close("FAILED")
    assert run.ended == 1
    WandbCopy(RUN).close(None)
    assert runs[1].ended == 0
    assert runs[1].options["resume"] == "allow"


def test_refusals_are_one_line_with_the_fix(runs, monkeypatch):
    def refuse(**options):
        raise ConnectionError("no API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(InputError, match=r"W&B refuses: no API key configured; log in with `wandb login`"):
        WandbCopy(RUN)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"WANDB_PROJECT: wandb is not installed; `pip install -e '\.\[wandb\]'`"):
        WandbCopy(RUN)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the package wandb")
def test_wandb_itself_writes_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "films")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(
        wandb_copy.mlflow, "get_run", lambda run_id: (_ for _ in ()).throw(wandb_copy.MlflowException("away"))
    )
    copy = WandbCopy(RUN)
    copy.log_params({"beta": 0.1})
    copy.log_metrics([*metric_points({"loss": 0.5}, 1), *metric_points({"eval/kl": 3.0})])
    assert copy.run.summary["eval/kl"] == 3.0
    copy.close("FINISHED")
    (file,) = Path("wandb").glob(f"offline-run-*-{RUN}/*.wandb")
    assert file.stat().st_size > 0
