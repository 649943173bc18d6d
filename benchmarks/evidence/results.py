"""The plan of the evidence with its results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence.plan import PLAN, RESULTS, Case, Plan, load_cases, load_plan, read_results
from benchmarks.evidence.statistics import Result

NOT_RUN = "**not run**"
LOSSES = ["losses", "more-losses"]
"""Groups of losses on the pairs of the data, at the same betas and seeds."""


@dataclass(frozen=True)
class Evidence:
    """The plan with its results."""

    plan: Plan
    cases: Mapping[str, Sequence[Case]]
    results: Mapping[str, Result]
    """Of cases of the plan with the planned settings, failed ones included."""

    @classmethod
    def read(cls, plan: Path = PLAN, folder: Path = RESULTS) -> "Evidence":
        """Read the plan and the results of its cases. Results of other settings are left out."""
        cases, results = load_cases(plan), read_results(folder)
        planned = {case.name: case.settings for group in cases.values() for case in group}
        used = {
            name: each
            for name, each in results.items()
            if name in planned and each["key"]["settings"] == planned[name]
        }
        return cls(load_plan(plan), cases, used)

    def methods(self, task: str) -> dict[str, list[Case]]:
        """Return the cases of each method of a task, from the first group that has it, without `LOSSES`."""
        methods: dict[str, list[Case]] = {}
        for name, group in self.plan.groups.items():
            if group.task == task and name not in LOSSES:
                for method in set(group.methods) - set(methods):
                    methods[method] = [case for case in self.cases[name] if case.method == method]
        order = [method for group in self.plan.groups.values() for method in group.methods]
        return dict(sorted(methods.items(), key=lambda item: order.index(item[0])))

    @property
    def losses(self) -> dict[str, list[Case]]:
        """Cases of each loss on the pairs of the data."""
        methods: dict[str, list[Case]] = {}
        for case in (case for name in LOSSES for case in self.cases.get(name, [])):
            methods.setdefault(case.method, []).append(case)
        return methods

    def finished(self, cases: Sequence[Case]) -> list[Result]:
        """Return the results of cases that did not fail."""
        return [
            self.results[c.name] for c in cases if c.name in self.results and "error" not in self.results[c.name]
        ]

    def runs(self, cases: Sequence[Case]) -> dict[int, list[Result]]:
        """Return the results by seed, of the seeds of which every case has finished or failed."""
        seeds = {case.seed: [each for each in cases if each.seed == case.seed] for case in cases}
        complete = {seed: each for seed, each in seeds.items() if all(case.name in self.results for case in each)}
        return {seed: runs for seed, each in complete.items() if (runs := self.finished(each))}

    def missing(self, cases: Sequence[Case]) -> str:
        """Return why a method has no complete seed."""
        return "no complete seed" if any(case.name in self.results for case in cases) else NOT_RUN
