"""The plan of the evidence: tasks, methods, settings, seeds and the primary comparison, from `plan.yaml`.

Each group of the plan lists methods of one task. A case is one policy: a method with one beta, one learning rate
and one seed. It leaves one JSON file.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from dpo.common.files import write_json
from dpo.common.settings import Settings
from dpo.config import Params, load_params
from dpo.engine.logprobs import ENGINE_VERSION
from dpo.training.settings import Trial

PLAN, RESULTS = Path("benchmarks/evidence/plan.yaml"), Path("benchmarks/results/evidence")
PACKAGES = ("torch", "transformers", "accelerate", "trl")
SECTIONS = ("model", "data", "validate", "engine", "sft", "dpo", "feedback", "reward_model", "online", "evaluate")
"""Sections of the settings that a result depends on."""


@dataclass(frozen=True, kw_only=True)
class Group(Settings):
    """Cases of one task that answer one question. Each method has a case for every combination of the lists."""

    task: str
    """Name of a settings file beside the plan. Its `sweep` has all values below."""
    methods: list[str]
    """`online-ROUNDS`, `rloo-ROUNDS`, a loss on the pairs of the data, or `best-of-N`."""
    betas: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    seeds: list[int]
    pairs_per_step: int | None = None
    """Pairs, or prompts with all their answers, per optimizer step. Null: `dpo.pairs_per_step` of the task."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """What is compared at equal KL."""

    group: str
    """The group of the primary comparison."""
    better: str
    """Method that is expected to be better."""
    worse: str
    judge: str
    """Judge of the primary comparison. The others of the task are reported, too."""
    kl: float
    """Nats per response at which the primary comparison is made."""
    other_kls: list[float]
    """Further points of the table, without a test."""


@dataclass(frozen=True, kw_only=True)
class Plan(Settings):
    """Groups in the order of their runs, and the primary comparison."""

    comparison: Comparison
    groups: dict[str, Group]


@dataclass(frozen=True)
class Case:
    """One policy. `params` have the seed of the case."""

    task: str
    method: str
    params: Params
    trial: Trial | None
    """None for best-of-n, which trains no policy."""

    @property
    def seed(self) -> int:
        """Seed of data, reference, reward model, training and responses."""
        return self.params.seed

    @property
    def name(self) -> str:
        """Name of the case and of its file."""
        return "-".join([self.task, self.trial.name if self.trial else f"{self.method}-{self.seed}"])

    @property
    def settings(self) -> str:
        """Hash of all settings that the result depends on."""
        values = {name: getattr(self.params, name) for name in SECTIONS}
        facts = {name: used(value) for name, value in values.items()}
        facts |= {"seed": self.seed, "method": self.method, "trial": self.trial and self.trial.settings}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def key(self) -> dict[str, Any]:
        """Settings, engine and packages. A result with another key is measured again."""
        return {"settings": self.settings, "engine": ENGINE_VERSION, "packages": packages()}


def used(settings: Any) -> Any:
    """Return settings as plain values, without those that are off: None, false, 0 or empty.

    A new option, which is off by default, therefore changes no hash, and earlier results keep their keys.
    """
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = asdict(settings)
    if isinstance(settings, dict):
        return {name: kept for name, value in settings.items() if (kept := used(value))}
    return [used(each) for each in settings] if isinstance(settings, list | tuple) else settings


def packages() -> dict[str, str]:
    """Return the versions of the packages that compute results."""
    return {name: version(name) for name in PACKAGES}


def load_plan(path: Path = PLAN) -> Plan:
    """Read and check the plan.

    Raises:
        InputError: a key or a value is wrong, or the comparison names an unknown group or method.
    """
    try:
        values = json.dumps(YAML(typ="safe", pure=True).load(path.read_text()))
        plan: Plan = TypeAdapter(Plan).validate_json(values)
    except ValidationError as error:
        faults = (f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise InputError("\n".join(faults)) from error
    primary = plan.groups.get(plan.comparison.group)
    if primary is None:
        raise InputError(f"{path}: comparison.group: no group {plan.comparison.group}; name one of groups")
    for key in ("better", "worse"):
        if (method := getattr(plan.comparison, key)) not in primary.methods:
            raise InputError(f"{path}: comparison.{key}: {method} is no method of the group; add it there")
    return plan


def load_cases(path: Path = PLAN) -> dict[str, list[Case]]:
    """Return the cases of each group, in the order of the runs: seed by seed, so that early results are complete.

    Raises:
        InputError: the plan or the settings of a task are wrong, or a value is not in the task's `sweep`.
    """
    return {
        name: _cases(group, path.parent / f"{group.task}.yaml") for name, group in load_plan(path).groups.items()
    }


def _cases(group: Group, file: Path) -> list[Case]:
    params = load_params(file)
    trials = {(method_of(each), each.beta, each.learning_rate, each.seed): each for each in params.trials()}
    if group.pairs_per_step:
        params = replace(params, dpo=replace(params.dpo, pairs_per_step=group.pairs_per_step))
    cases = []
    for seed in group.seeds:
        seeded = replace(params, seed=seed)
        for method in group.methods:
            if best_of(method):
                cases.append(Case(group.task, method, seeded, None))
                continue
            for beta in group.betas:
                for rate in group.learning_rates:
                    point = (method, beta, rate, seed)
                    if point not in trials:
                        raise InputError(
                            f"{file}: sweep: no trial {method} with beta {beta}, learning rate {rate} and seed "
                            f"{seed}, which the plan names; add the values to the lists of sweep"
                        )
                    cases.append(Case(group.task, method, seeded, trials[point]))
    return cases


def method_of(trial: Trial) -> str:
    """Return the name of a trial's method: `online-4`, `online-4-sft`, `rloo-4`, or a loss on the data's pairs."""
    loss = None if trial.method and trial.loss.name == "sigmoid" else trial.loss.name
    return "-".join(str(part) for part in (trial.method, trial.rounds, loss) if part is not None)


def best_of(method: str) -> int | None:
    """Return n of `best-of-n`, None for other methods."""
    match = re.fullmatch(r"best-of-(\d+)", method)
    return int(match[1]) if match else None


# Results


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the results in a folder by case, failed ones included."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def is_finished(case: Case, results: dict[str, dict[str, Any]]) -> bool:
    """Return whether a case has a result, or has failed, with these settings, engine and packages."""
    return case.name in results and results[case.name]["key"] == case.key


def write_result(case: Case, facts: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write the result of a case atomically, in short lines."""
    about = {"case": case.name, "task": case.task, "method": case.method, "seed": case.seed, "key": case.key}
    trial = {name: getattr(case.trial, name) for name in ("beta", "learning_rate")} if case.trial else {}
    write_json(folder / f"{case.name}.json", about | trial | facts)
