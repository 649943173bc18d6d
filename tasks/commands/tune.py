"""Command `dpo tune`: search for a learning rate, a beta and a loss with Optuna.

Each trial of the search is an experiment of DVC, `dvc exp run --temp`, of the same `dvc.yaml` with a sweep of one
policy. The checkout stays as it is. Its MLflow has every run, DVC every experiment, and a database of Optuna the
search, which continues after an interruption.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.config import Params, load_params
from dpo.training.losses import LossName
from dpo.training.settings import Trial
from tasks.common.git import experiment_file
from tasks.common.paths import COMPARISON, REPORTS
from tasks.tracking import offline

FOLDER = Path(".tune")
POLL_SECONDS = 2.0
STOP_SECONDS = 60
FIRST_TRIALS = 5
"""Complete trials before others can be stopped early, and random trials before Optuna uses the results."""
ACCURACY = "train/eval_rewards/accuracies"
"""Metric of MLflow: accuracy on the validation pairs of `dpo.early_stop`."""


@dataclass(frozen=True)
class Space:
    """What is searched. The scales of the bounds are logarithmic."""

    losses: tuple[LossName, ...]
    betas: tuple[float, float]
    learning_rates: tuple[float, float]


def tune(
    name: str, trials: int, losses: Sequence[LossName], betas: tuple[float, float] | None,
    learning_rates: tuple[float, float] | None,
) -> None:  # fmt: skip
    """Run trials until the search `name` has `trials` of them, print them, and write `reports/NAME.html`.

    The figure of `compare.select` is maximised among the policies that the stage `compare` would select: those
    within `compare.max_kl` and all guardrails. With `dpo.early_stop`, a trial stops if its accuracy on the
    validation pairs is below the median of the trials before it at the same step.

    Raises:
        InputError: settings or bounds are invalid, the search was started with others, another process runs it, or
            the first trial fails.
    """
    params = load_params()
    if unknown := [each for each in losses if each not in params.losses]:
        raise InputError(f"--loss: {unknown[0]} is not a loss; use one of {', '.join(params.losses)}")
    space = Space(
        losses=tuple(losses or (*params.sweep.losses, *params.sweep.reference_free_losses)),
        betas=_bounds("--betas", betas, params.sweep.betas),
        learning_rates=_bounds("--learning-rates", learning_rates, params.sweep.learning_rates),
    )
    FOLDER.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # `run_experiment` ends DVC
    # Shells ignore SIGINT in background jobs, and so would DVC.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with FileLock(FOLDER / f"{name}.lock", timeout=0):
            study = open_study(name, params, space)
            while sum(each.state.is_finished() for each in study.trials) < trials:
                run_trial(study, params, space)
    except Timeout:
        raise InputError(f"--name: another process runs the search {name}; use another name") from None
    page = REPORTS / f"{name}.html"
    write_plots(study, params, page)
    print(f"\n{table(study, params)}\n\nplots: {page}")


def _bounds(option: str, given: tuple[float, float] | None, values: Sequence[float]) -> tuple[float, float]:
    """Return the given bounds, or a third of the sweep's least value and three times its greatest."""
    low, high = given or (min(values) / 3, max(values) * 3)
    if not 0 < low < high:
        raise InputError(f"{option}: {low:g} {high:g}: give two numbers above 0, the lower one first")
    return low, high


def open_study(name: str, params: Params, space: Space) -> optuna.Study:
    """Create or load a search. Trials that were interrupted are repeated.

    Raises:
        InputError: the search was started with other settings or bounds.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name,
        storage=f"sqlite:///{FOLDER / f'{name}.db'}",
        sampler=optuna.samplers.TPESampler(seed=params.seed, n_startup_trials=FIRST_TRIALS),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_TRIALS),
        direction="maximize",
        load_if_exists=True,
    )
    settings = {key: value for key, value in vars(params).items() if key not in ("run", "sweep")}
    _check_unchanged(study, "settings", f"{settings} {space}")
    for interrupted in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(interrupted.number, state=TrialState.FAIL)
        study.enqueue_trial(interrupted.params)
    return study


def _check_unchanged(study: optuna.Study, what: str, value: str) -> None:
    """Record a value, and raise InputError if the search began with another one."""
    if study.user_attrs.get(what, value) != value:
        raise InputError(f"--name: the search {study.study_name} began with other {what}; use another name")
    study.set_user_attr(what, value)


def run_trial(study: optuna.Study, params: Params, space: Space) -> None:
    """Run the next trial of a search as an experiment of DVC.

    Raises:
        InputError: the trial fails before any trial was complete, or data, reference or judges have changed.
    """
    asked = study.ask()
    loss: LossName = asked.suggest_categorical("loss", space.losses)
    beta = float(f"{asked.suggest_float('beta', *space.betas, log=True):.3g}")
    learning_rate = float(f"{asked.suggest_float('learning rate', *space.learning_rates, log=True):.3g}")
    trial = Trial(loss=params.losses[loss], beta=beta, learning_rate=learning_rate, seed=params.sweep.seeds[0])
    experiment = f"{study.study_name}-{asked.number}"
    asked.set_user_attr("experiment", experiment)
    _tell(f"{experiment}: {loss}, beta {beta:g}, learning rate {learning_rate:g}")
    watch = Watch(asked, trial.name) if params.dpo.early_stop else None
    output = run_experiment(experiment, sweep_of(params, trial), watch)
    if watch and watch.stopped:
        study.tell(asked, state=TrialState.PRUNED)
        _tell(f"{experiment}: stopped, accuracy {watch.accuracy:.3f} on the validation pairs is below the median")
        return
    if output is not None:
        study.tell(asked, state=TrialState.FAIL)
        if not study.get_trials(states=(TrialState.COMPLETE,)):
            raise InputError(f"{experiment} failed:\n{output}")
        _tell(f"{experiment}: failed:\n{output}")
        return
    lock = YAML(typ="safe", pure=True).load(experiment_file(experiment, Path("dvc.lock")))
    (samples,) = lock["stages"]["reference_samples"]["outs"]
    _check_unchanged(study, "data, reference or judges", f"{samples['path']} {samples['md5']}")
    comparison = json.loads(experiment_file(experiment, COMPARISON))
    figures = comparison["policies"][trial.name]
    asked.set_user_attr("kl", figures["kl"])
    asked.set_constraint("max_kl", figures["kl"] - params.compare.max_kl)
    asked.set_constraint("guardrails", comparison["selected"] is None)
    value = figures[params.compare.select]
    study.tell(asked, value)
    _tell(f"{experiment}: {params.compare.select.replace('_', ' ')} {value:.3f}, KL {figures['kl']:.2f} nats")


def sweep_of(params: Params, trial: Trial) -> list[str]:
    """Return the changes of `params.yaml` for a sweep of one trial, as `dvc exp run -S` takes them."""
    name = trial.loss.name
    numbers = {"betas": trial.beta, "learning_rates": trial.learning_rate, "seeds": trial.seed}
    lists = (
        params.loss_lists([name]) | {key: [value] for key, value in numbers.items()} | {"rounds": [], "rloo": []}
    )
    changes = [f"sweep.{key}=[{','.join(map(str, values))}]" for key, values in lists.items()]
    if name not in YAML(typ="safe", pure=True).load(Path("params.yaml"))["losses"]:
        changes.append(f"+losses.{name}={{}}")
    return changes


@dataclass
class Watch:
    """The accuracy on the validation pairs while a trial trains. `stopped` says that it is below the median."""

    asked: optuna.Trial
    trial: str
    began: int = field(default_factory=lambda: int(1000 * time.time()))
    stopped: bool = False
    accuracy: float = float("nan")
    reported: int = 0

    def update(self) -> None:
        """Read the points that are new in MLflow."""
        client = MlflowClient()
        query = f"tags.`{offline.TRIAL}` = '{self.trial}' and attributes.start_time >= {self.began}"
        runs = offline.search(client, query)
        points = client.get_metric_history(runs[0].info.run_id, ACCURACY) if runs else []
        for point in sorted(points, key=lambda each: each.step)[self.reported :]:
            self.reported, self.accuracy = self.reported + 1, point.value
            self.asked.report(point.value, point.step)
            self.stopped = self.stopped or self.asked.should_prune()


def run_experiment(name: str, changes: Sequence[str], watch: Watch | None) -> str | None:
    """Run `dvc exp run --temp` with changes of `params.yaml`. Return None, or the last lines of its output.

    An earlier experiment of the same name is replaced. On an interruption the experiment ends as well.
    """
    options = [option for change in changes for option in ("--set-param", change)]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--force", "--name", name, *options]
    log = FOLDER / f"{name}.log"
    if watch:
        offline.connect()
    with log.open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if watch and not watch.stopped:
                    watch.update()
                    if watch.stopped:
                        _interrupt(process)
        except BaseException:
            _interrupt(process)
            raise
        output.seek(0)
        return "\n".join(output.read().splitlines()[-12:]) if process.returncode else None


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Interrupt DVC and its stage as Ctrl-C does, so that DVC removes the experiment's folder."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def best(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial with the highest value among those that `compare` would select."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(filter(_allowed, complete), key=lambda each: each.value or 0.0, default=None)


def _allowed(trial: FrozenTrial) -> bool:
    return all(excess <= 0 for excess in trial.constraints.values())


def table(study: optuna.Study, params: Params) -> str:
    """Return all trials, the best one, and the command that brings it into the checkout."""
    columns = ("experiment", "loss", "beta", "learning rate", params.compare.select.replace("_", " "), "KL (nats)")
    lines = ["".join(f"{title:>16}" for title in (*columns, "state"))]
    states = {TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed", TrialState.COMPLETE: "complete"}
    for each in study.trials:
        if not each.state.is_finished():
            continue
        beta, rate = (f"{each.params[key]:.3g}" for key in ("beta", "learning rate"))
        complete = each.state == TrialState.COMPLETE
        figures = (f"{each.value:.3f}", f"{each.user_attrs['kl']:.2f}") if complete else ("-", "-")
        state = "excluded" if complete and not _allowed(each) else states[each.state]
        cells = (each.user_attrs["experiment"], each.params["loss"], beta, rate, *figures, state)
        lines.append("".join(f"{cell:>16}" for cell in cells))
    found = best(study)
    if found is None:
        return "\n".join([*lines, "", "no policy is within compare.max_kl and all guardrails"])
    name = found.user_attrs["experiment"]
    return "\n".join([*lines, "", f"{name} is the best; `dvc exp apply {name}` takes it into this checkout"])


def write_plots(study: optuna.Study, params: Params, page: Path) -> None:
    """Write the search as a page of plots: the value by trial, and by beta, learning rate and loss."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return
    title = params.compare.select.replace("_", " ")
    history = optuna.visualization.plot_optimization_history(study, target_name=title)
    slices = optuna.visualization.plot_slice(study, target_name=title)
    history.update_layout(title=f"{title.capitalize()} of each trial")
    slices.update_layout(title=f"{title.capitalize()} by beta, learning rate and loss")
    parts = [history.to_html(full_html=False), slices.to_html(full_html=False, include_plotlyjs=False)]
    page.parent.mkdir(exist_ok=True)
    with atomic_write(page) as tmp:
        body = "\n".join(parts)
        tmp.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Search</title>{body}</html>\n'
        )


def _tell(line: str) -> None:
    print(line, flush=True)
