"""What pages show of promotions: figures of versions, and the names of sweeps."""

import re

import mlflow

from tasks.report.promotion import describe
from tasks.tracking import offline, registry, sweeps
from tests.support.project import TRIAL


def policy_of_a_sweep(rate: float, pairs: str) -> tuple[str, str, dict[str, str]]:
    """Return the ids of a new sweep and of its policy, and the tags of its promotion."""
    sweep = offline.new_run("sweep", {offline.ROLE: "sweep"})
    policy = offline.new_run(TRIAL, {offline.ROLE: "policy", "mlflow.parentRunId": sweep})
    for name, value in (("", rate), ("_low", rate - 0.1), ("_high", rate + 0.1)):
        mlflow.MlflowClient().log_metric(policy, f"eval/win_rate{name}", value)
    tags = {"git_commit": "a" * 40, "trial": TRIAL, "run": policy, registry.PAIRS: pairs}
    return sweep, policy, tags


def test_the_page_of_a_promotion_compares_old_and_new_figures(models, monkeypatch):
    monkeypatch.setenv("DPO_MLFLOW_PAGES", "http://127.0.0.1:5000")
    registry.promote(models[0], policy_of_a_sweep(0.6, "80")[2])
    second = registry.promote(models[1], policy_of_a_sweep(0.7, "90")[2])
    page = describe(second)
    assert "[version 2](http://127.0.0.1:5000/#/models/dpo-policy/versions/2)" in page
    assert f"commit: `{'a' * 40}`" in page
    assert "training rows: 90" in page
    assert "| figure | version 1 | version 2 |" in page
    assert "| win rate against the reference | 0.600 [0.500, 0.700] | 0.700 [0.600, 0.800] |" in page


def test_the_list_of_sweeps_shows_date_commit_verdict_and_which_one_serves(models):
    made = [policy_of_a_sweep(0.6, "80") for _ in range(3)]
    for number, (_, policy, tags) in enumerate(made):
        if number < 2:
            registry.promote(models[number], tags)
        sweeps.record_decision(policy, "promoted" if number < 2 else "kept", "why")

    def names() -> list[str]:
        return [mlflow.get_run(sweep).info.run_name for sweep, _, _ in made]

    assert all(re.match(r"sweep \d{4}-\d\d-\d\d \d\d:\d\d \w{4,7}: ", name) for name in names())
    verdicts = [name.partition(": ")[2] for name in names()]
    assert verdicts == ["promoted", "promoted, serves as version 2", "kept"]
    registry.set_champion("1")
    sweeps.name_sweeps()
    verdicts = [name.partition(": ")[2] for name in names()]
    assert verdicts == ["promoted, serves as version 1", "promoted", "kept"]
