"""The search of `dpo tune`, with DVC replaced by a function of the settings."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.training.settings import EarlyStopSettings
from tasks.commands import tune
from tasks.common import paths
from tasks.common.git import experiment_file
from tests.support.project import ROOT

PARAMS = load_params(ROOT / "params.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder. The KL of an experiment is 1 / beta, its win rate 0.5 + KL / 40."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    project = Project()
    monkeypatch.setattr(tune, "run_experiment", project.run)
    monkeypatch.setattr(tune, "experiment_file", project.file)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return project


class Project:
    """Experiments by name."""

    def __init__(self):
        self.experiments, self.faults, self.samples, self.interrupt_at = {}, {}, "md5 of the samples", None

    def run(self, name, changes, watch):
        if name == self.interrupt_at:
            raise KeyboardInterrupt
        self.experiments[name] = {key: value.strip("[]") for key, value in (each.split("=") for each in changes)}
        return self.faults.get(name)

    def file(self, name, path):
        if path == Path("dvc.lock"):
            outs = [{"path": "samples/reference.parquet", "md5": self.samples}]
            return json.dumps({"stages": {"reference_samples": {"outs": outs}}})
        sweep = self.experiments[name]
        beta = float(sweep["sweep.betas"])
        loss = sweep["sweep.losses"] or sweep["sweep.reference_free_losses"]
        trial = "-".join([loss, *(sweep[f"sweep.{key}"] for key in ("betas", "learning_rates", "seeds"))])
        figures = {"kl": 1 / beta, "win_rate": 0.5 + 1 / beta / 40}
        return json.dumps({"policies": {trial: figures}, "selected": trial if beta > 0.01 else None})


def search(trials, **options):
    chosen = {"name": "tune", "losses": [], "betas": (0.001, 10.0), "learning_rates": None} | options
    tune.tune(chosen["name"], trials, chosen["losses"], chosen["betas"], chosen["learning_rates"])
    space = tune.Space(("sigmoid",), (0.001, 10.0), tune._bounds("", None, [7e-5]))
    return tune.open_study(chosen["name"], load_params(), space)


def test_the_best_policy_is_within_the_kl_budget_and_all_guardrails(project, capsys):
    study = search(16)
    assert len(project.experiments) == 16
    betas = {name: float(sweep["sweep.betas"]) for name, sweep in project.experiments.items()}
    allowed = {name: beta for name, beta in betas.items() if 1 / beta <= PARAMS.compare.max_kl}
    assert set(betas) > set(allowed), "some are excluded"
    best = min(allowed, key=allowed.get)
    assert tune.best(study).user_attrs["experiment"] == best
    printed = capsys.readouterr().out
    assert f"{best} is the best; `dvc exp apply {best}` takes it into this checkout" in printed
    assert printed.count(" excluded") == 16 - len(allowed)
    page = Path("reports/tune.html").read_text()
    assert "Win rate of each trial" in page
    assert "Win rate by beta, learning rate and loss" in page


def test_trials_have_short_values_within_the_bounds(project):
    search(6)
    for sweep in project.experiments.values():
        assert re.fullmatch(r"\d\.?\d*(e-\d+)?", sweep["sweep.learning_rates"])
        assert PARAMS.sweep.learning_rates[0] / 3.01 <= float(sweep["sweep.learning_rates"]) <= 2.11e-4
        assert sweep["sweep.seeds"] == str(PARAMS.sweep.seeds[0])
        assert sweep["sweep.rounds"] == ""


def test_a_search_continues_and_repeats_the_interrupted_trial(project):
    project.interrupt_at = "tune-2"
    with pytest.raises(KeyboardInterrupt):
        search(4)
    project.interrupt_at = None
    study = search(5)
    states = [each.state for each in study.trials]
    assert states == [TrialState.COMPLETE] * 2 + [TrialState.FAIL] + [TrialState.COMPLETE] * 2
    assert study.trials[3].params == study.trials[2].params
    assert set(project.experiments) == {"tune-0", "tune-1", "tune-3", "tune-4"}
    done = dict(project.experiments)
    search(5)
    assert project.experiments == done


def test_a_search_with_other_settings_or_bounds_needs_another_name(project):
    search(1)
    with pytest.raises(InputError, match="--name: the search tune began with other settings; use another name"):
        search(2, betas=(0.01, 1.0))
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("samples: 256", "samples: 128"))
    with pytest.raises(InputError, match="other settings"):
        search(2)
    Path("params.yaml").write_text(text.replace("checkpoint_minutes: 5", "checkpoint_minutes: 6"))
    search(2)


def test_a_change_of_the_data_ends_the_search(project):
    search(1)
    project.samples = "another md5"
    with pytest.raises(InputError, match="other data, reference or judges"):
        search(2)


def test_the_first_failure_ends_the_search_and_a_later_one_does_not(project, capsys):
    project.faults = {"tune-0": "no space left on device"}
    with pytest.raises(InputError, match="tune-0 failed:\nno space left on device"):
        search(3)
    project.faults = {"tune-2": "the loss is not finite"}
    assert [each.state.name for each in search(4).trials] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert "tune-2: failed:\nthe loss is not finite" in capsys.readouterr().out


def test_losses_that_params_yaml_does_not_list_are_added(project):
    tune.tune("tune", 1, ["simpo"], None, None)
    (sweep,) = project.experiments.values()
    assert sweep["+losses.simpo"] == "{}"
    assert (sweep["sweep.losses"], sweep["sweep.reference_free_losses"]) == ("", "simpo")
    with pytest.raises(InputError, match="--loss: dpo is not a loss; use one of sigmoid, "):
        tune.tune("tune", 1, ["dpo"], None, None)


@pytest.mark.parametrize("bounds", [(1.0, 0.1), (0.0, 1.0), (-1.0, 1.0), (0.1, 0.1), (math.nan, 1.0)])
def test_bounds_are_two_numbers_above_zero_in_order(bounds):
    with pytest.raises(InputError, match=r"--betas: .* give two numbers above 0, the lower one first"):
        tune._bounds("--betas", bounds, [0.1])


def test_a_trial_below_the_median_accuracy_stops_training(project, monkeypatch):
    early_stop = EarlyStopSettings(validation_share=0.1, every_steps=5, patience=3)
    with_early_stop = dataclasses.replace(PARAMS.dpo, early_stop=early_stop)
    monkeypatch.setattr(tune, "load_params", lambda: dataclasses.replace(PARAMS, dpo=with_early_stop))
    points = {}

    class Client:
        def get_metric_history(self, run_id, key):
            assert key == "train/eval_rewards/accuracies"
            return points["now"]

    def run(name, changes, watch):
        accuracy = 0.4 if name == "tune-6" else 0.8
        for steps in ((5,), (5, 10)):
            points["now"] = [type("Point", (), {"step": step, "value": accuracy}) for step in reversed(steps)]
            if not watch.stopped:
                watch.update()
        return Project.run(project, name, changes, watch) or ("interrupted" if watch.stopped else None)

    monkeypatch.setattr(tune, "MlflowClient", Client)
    found = type("Run", (), {"info": type("Info", (), {"run_id": "1"})})
    monkeypatch.setattr(tune.offline, "search", lambda client, query: [found])
    monkeypatch.setattr(tune, "run_experiment", run)
    tune.tune("tune", 8, [], (0.2, 10.0), None)
    space = tune.Space(("sigmoid",), (0.2, 10.0), tune._bounds("", None, PARAMS.sweep.learning_rates))
    states = [each.state for each in tune.open_study("tune", tune.load_params(), space).trials]
    assert states == [TrialState.COMPLETE] * 6 + [TrialState.PRUNED, TrialState.COMPLETE]


def test_experiments_use_the_stores_of_their_checkout():
    assert paths.checkout(Path("/home/team/project")) == Path()
    assert paths.checkout(Path("/home/team/project/.dvc/tmp/exps/standalone/tmpa1")) == Path("/home/team/project")
    assert paths.checkout(Path("/home/team/project/.dvc/tmp/exps/tmpa1/sub")) == Path("/home/team/project")


def test_an_input_that_an_experiment_lacks_is_named(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc/tmp/exps/standalone/tmp1"
    for folder in (tmp_path, copy):
        (folder / "data/own").mkdir(parents=True)
    (tmp_path / "data/own/pairs.jsonl").touch()
    monkeypatch.chdir(copy)
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    with pytest.raises(InputError, match=r"run `dvc add data/own/pairs.jsonl` and `git"):
        paths.check_copied(None, "data/own/pairs.jsonl")
    paths.check_copied("data/own/missing.jsonl", "Org/Model")


def test_a_file_of_an_unknown_experiment_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(InputError, match=r"none: no experiment of DVC with this name has dvc.lock"):
        experiment_file("none", Path("dvc.lock"))


def test_an_interruption_ends_dvc_and_its_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(["sh", "-c", "sleep 60; exit 3"], start_new_session=True)
    time.sleep(0.5)  # the shell starts its child
    tune._interrupt(process)
    signal.signal(signal.SIGINT, before)
    assert process.returncode == -signal.SIGINT
