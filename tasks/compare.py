"""Stage `compare`: compare all policies, select one and write the report."""

import json
from typing import Any

import pandas as pd

from dpo.common.files import atomic_write, write_json
from dpo.config import Params, load_params
from dpo.engine.chat import read_turns, turns_of
from dpo.evaluation.bootstrap import bootstrap, mean
from dpo.evaluation.gate import kept_for_gate
from dpo.evaluation.pair_metrics import reliability, slices
from dpo.evaluation.response_metrics import win_slices
from dpo.evaluation.selection import compare_policies, failure_modes, select, tested_metric
from dpo.evaluation.yardsticks import yardsticks
from tasks.common import paths
from tasks.common.runner import check_store, run
from tasks.report.comparison import Results, concatenate, draw_figures, selection_page, write_report
from tasks.report.figures import reward_metric


def main() -> None:
    """Select a policy, write metrics and report, and log them."""
    params = load_params()
    check_store()
    remove_earlier(params)
    results = compare(params)
    write_metrics(results)
    write_json(paths.JUDGE_REPLIES, results.replies)
    figures = draw_figures(params, results)
    from tasks.tracking.models import log_models  # after the comparison: MLflow starts slowly
    from tasks.tracking.runs import frontier_page, log_comparison

    frontier = frontier_page(params, reward_metric(results.policies))
    write_report(params, results, figures, frontier)
    with atomic_write(paths.SELECTION) as tmp:
        tmp.write_text(selection_page(results, params.compare.select, frontier))
    selection = results.selection
    log_comparison(params, results.policies, selection.name, selection.reason, figures)
    selected = [paths.policy_folder(trial) for trial in results.trials if trial.name == selection.name]
    log_models(params, [paths.REFERENCE, *selected])


def remove_earlier(params: Params) -> None:
    """Delete results of trials and reward models that left the sweep. DVC's cache and git have committed ones.

    The stage depends on the folders, so a leftover file would make it stale in a clone, which does not have it.
    """
    files = (paths.policy_margins, paths.policy_samples, paths.evaluation, paths.train_log, paths.cost)
    current = {paths.REFERENCE_SAMPLES, paths.REFERENCE_COST}
    current |= {path(trial) for trial in params.trials() for path in files}
    current |= {paths.reward_metrics(seed) for seed in params.sweep.reward_models}
    for folder in {paths.REWARD_MODELS, *(path.parent for path in current)}:
        for leftover in {*folder.glob("*.parquet"), *folder.glob("*.csv"), *folder.glob("*.json")} - current:
            leftover.unlink()


def compare(params: Params) -> Results:
    """Read the results of all trials, test their differences and select a policy."""
    trials = params.trials()
    policies = {trial.name: json.loads(paths.evaluation(trial).read_text()) for trial in trials}
    pairs = {trial.name: pd.read_parquet(paths.policy_margins(trial)) for trial in trials}
    samples = {trial.name: pd.read_parquet(paths.policy_samples(trial)) for trial in trials}
    prompts = pd.read_parquet(paths.REFERENCE_SAMPLES)
    replies = [table.attrs.pop(paths.REPLIES, {}) for table in (prompts, *samples.values())]
    choice, rows = policies, pairs
    if not params.evaluate.judges:
        choice, rows = on_half(policies, pairs, params.seed)
    column, tables = ("win", samples) if tested_metric(params.compare) == "win_rate" else ("correct", rows)
    outcomes = {name: table[column].tolist() for name, table in tables.items()}
    comparisons = compare_policies(outcomes, tables[trials[0].name]["prompt"].tolist(), params.seed)
    responses = samples[trials[0].name]  # the reference's responses are the same for all policies
    judged = {name: table.assign(source=prompts["source"]) for name, table in samples.items() if "win" in table}
    selection = select(choice, comparisons, params.compare)
    return Results(
        trials=trials,
        policies=policies,
        selection=selection,
        failure_modes={name: failure_modes(metrics, params.compare) for name, metrics in policies.items()},
        tests=pd.DataFrame([vars(each) | {"verdict": each.verdict} for each in comparisons]),
        pairs=concatenate(pairs),
        samples=samples,
        conversations=[
            turns_of(text if turns is None else read_turns(turns))
            for text, turns in zip(prompts["prompt"], prompts["turns"], strict=True)
        ],
        costs={str(paths.REFERENCE): json.loads(paths.REFERENCE_COST.read_text())}
        | {trial.name: policies[trial.name]["cost"] for trial in trials},
        reward_models={
            seed: json.loads(paths.reward_metrics(seed).read_text())["accuracy"]
            for seed in params.sweep.reward_models
        },
        yardsticks=yardsticks(responses.get("reference_score", []), responses["prompt"].tolist()),
        replies={key: reply for each in replies for key, reply in each.items()},
        train_logs=concatenate({trial.name: pd.read_csv(paths.train_log(trial)) for trial in trials}),
        calibration=concatenate({name: reliability(table) for name, table in pairs.items()}),
        slices=concatenate({name: slices(table, params.seed) for name, table in pairs.items()}),
        wins=concatenate({name: win_slices(table, params.seed) for name, table in judged.items()})
        if judged
        else pd.DataFrame(),
    )


def on_half(
    policies: dict[str, dict[str, Any]], pairs: dict[str, pd.DataFrame], seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, pd.DataFrame]]:
    """Return metrics and pairs for the choice without a judge: on the prompts that are not kept for the gate."""
    kept = kept_for_gate(next(iter(pairs.values()))["prompt"].tolist())
    if kept.all():
        return policies, pairs
    half = {name: table[~kept] for name, table in pairs.items()}
    figures = {
        name: bootstrap(
            {"reward_accuracy": mean(table["correct"]), "margin": mean(table["margin"])},
            table["prompt"].tolist(),
            seed,
        )
        for name, table in half.items()
    }
    return {name: metrics | figures[name] for name, metrics in policies.items()}, half


def write_metrics(results: Results) -> None:
    """Write `comparison.json`, and the tables for plots as CSV."""
    policies = {
        name: metrics
        | {"failure_modes": sorted({mode.name for mode in results.failure_modes[name] if mode.detected})}
        for name, metrics in results.policies.items()
    }
    selection = results.selection
    verdict = {"selected": selection.name, "against_reference": selection.against_reference}
    write_json(paths.COMPARISON, verdict | {"reason": selection.reason, "policies": policies})
    names = ("win_rate", "reward_accuracy", "margin", "kl")
    figures = policies.get(selection.name or "", {})
    write_json(paths.SUMMARY, verdict | {name: figures[name] for name in names if name in figures})
    reward = reward_metric(results.policies)
    frontier = pd.DataFrame(
        {"policy": name, "beta": metrics["trial"]["beta"], "kl": metrics["kl"], "reward": metrics[reward]}
        for name, metrics in results.policies.items()
    )
    frontier = pd.concat([frontier, results.yardsticks])
    tables = {"calibration": results.calibration, "slices": results.slices, "tests": results.tests}
    for name, table in {"frontier": frontier, **tables}.items():
        with atomic_write(paths.METRICS / f"{name}.csv") as tmp:
            table.to_csv(tmp, index=False)


if __name__ == "__main__":
    run(main)
