"""Write the figures of `docs/internals/evidence.md` from the result files. No figure has another source."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.plan import Case
from benchmarks.evidence.results import NOT_RUN, Evidence
from benchmarks.evidence.statistics import (
    Bounds,
    Numbers,
    Result,
    Statistic,
    curve,
    over_seeds,
    permutation_p,
    reward_at,
    seeds_or_prompts,
    weighted_mean,
)
from benchmarks.page import put_table
from dpo.evaluation.verifier_metrics import pass_at_k

PAGE, LOSSES_PAGE = Path("docs/internals/evidence.md"), Path("docs/reference/losses.md")
PPO = Path("benchmarks/results/evidence-ppo.json")
QUESTIONS = {
    "on-policy": [("online-4", "online-1"), ("online-8", "online-1")],
    "rlhf": [("online-4", "rloo-4"), ("online-8", "rloo-8"), ("sigmoid", "rloo-4")],
    "training": [("online-4", "best-of-8"), ("rloo-4", "best-of-8")],
    "demonstrations": [("sigmoid", "sft")],
}
"""Comparisons on the sentences that answer a question of the page."""
MODELS = {"sigmoid": ["policy"], "online-4": ["policy", "reward model"], "rloo-4": ["policy", "reward model"]}
"""Models in memory while a policy trains. The reference is loaded before and freed."""


def write(page: Path = PAGE, losses_page: Path = LOSSES_PAGE) -> None:
    """Write all figures of the page, and those of the losses to their page."""
    evidence = Evidence.read()
    for name, text in blocks(evidence).items():
        put_table(page, f"evidence-{name}", text)
    for name, text in loss_blocks(evidence).items():
        put_table(losses_page, f"evidence-{name}", text)


def blocks(evidence: Evidence) -> dict[str, str]:
    """Return the parts of the page by name."""
    sentences, methods = judges(evidence), evidence.methods("sentences")
    return {
        "status": status(evidence),
        "primary": primary(evidence, sentences),
        "frontier": frontier(evidence, sentences, methods),
        **{f"equal-kl-{n}": equal_kl(evidence, judge, methods) for n, judge in enumerate(sentences, 1)},
        "compute": compute(evidence),
        "cost": cost(evidence),
        "memory": memory(evidence),
        "arithmetic": arithmetic(evidence),
        **{name: "\n".join(answer(evidence, pairs)) for name, pairs in QUESTIONS.items()},
    }


def loss_blocks(evidence: Evidence) -> dict[str, str]:
    """Return the parts of the page of losses by name."""
    names = judges(evidence)
    equal = [equal_kl(evidence, judge, evidence.losses) for judge in names]
    return {
        "losses": "\n\n".join([*equal, frontier(evidence, names, evidence.losses)]),
        "losses-sigmoid": beside_sigmoid(evidence, names),
    }


def judges(evidence: Evidence) -> list[str]:
    """Return the names of the judges that evaluate on the sentences."""
    case = evidence.cases[evidence.plan.comparison.group][0]
    return [judge.name for judge in case.params.evaluate.judges]


# Tables


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns except the first are numbers."""
    head = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


def figure(value: float, bounds: Bounds | None, digits: int = 3, *, signed: bool = False) -> str:
    """Return a value with its interval, if it has one."""
    sign = "+" if signed else ""
    text = f"{value:{sign}.{digits}f}"
    return text + (f" [{bounds[0]:{sign}.{digits}f}, {bounds[1]:{sign}.{digits}f}]" if bounds else "")


def mean_over_seeds(
    runs: Mapping[int, list[Result]], statistic: Callable[[list[Result], Numbers], Numbers]
) -> tuple[float, Bounds | None, int]:
    """Return mean, 95% interval and number of seeds of a statistic, leaving out seeds of which it is NaN."""
    prompts = {seed: len(each[0]["prompts"]["responses"]) for seed, each in runs.items()}
    values = {seed: float(statistic(each, np.ones((1, prompts[seed])))[0]) for seed, each in runs.items()}
    known = {seed: prompts[seed] for seed, value in values.items() if not np.isnan(value)}
    if not known:
        return float("nan"), None, 0
    bounds = over_seeds(lambda seed, weights: statistic(runs[seed], weights), known)
    return float(np.mean([values[seed] for seed in known])), bounds, len(known)


def reward(runs: list[Result], weights: Numbers, *, judge: str, kl: float) -> Numbers:
    """Return the reward [B] of a method and seed at a KL."""
    return reward_at(*curve(runs, judge, weights), kl)


def status(evidence: Evidence) -> str:
    """Return the number of cases of each group by state, and the versions that measured them."""
    rows = []
    for name, cases in evidence.cases.items():
        failed = sum("error" in evidence.results.get(case.name, {}) for case in cases)
        done = len(evidence.finished(cases))
        left = len(cases) - done - failed
        label = f"{left} {NOT_RUN}" if left else "0"
        methods = ", ".join(evidence.plan.groups[name].methods)
        rows.append([name, methods, str(len(cases)), str(done), str(failed), label])
    text = table(["group", "methods", "policies", "finished", "failed", "left"], rows)
    versions = {measured_with(each) for each in evidence.results.values()}
    return text + "".join(f"\n\nMeasured with {each}." for each in sorted(versions))


def measured_with(result: Result) -> str:
    """Return engine, packages and machine of a result. Those of a failed case have no machine."""
    packages = ", ".join(f"{name} {version}" for name, version in sorted(result["key"]["packages"].items()))
    text = f"engine {result['key']['engine']}, {packages}"
    if "error" in result:
        return text
    return text + f", {device(result)}, {_count(result['seconds'].get('cases_at_once', 1), 'policy')} at once"


def device(result: Result) -> str:
    """Return the name of the GPU, or `CPU`."""
    return str(result.get("device", "CPU"))


def frontier(evidence: Evidence, judges: Sequence[str], methods: Mapping[str, Sequence[Case]]) -> str:
    """Return KL and reward of the policies of these methods and of their references, as means over seeds."""
    rows, first = [], {each["seed"]: [each] for cases in methods.values() for each in evidence.finished(cases)}
    if first:
        rows.append(["reference", str(len(first)), "0", *means(first, [f"reference_score/{j}" for j in judges])])
    for method, cases in methods.items():
        points: dict[str, dict[int, list[Result]]] = {}
        for each in evidence.finished(cases):
            label = ", ".join([method, *(f"{each[name]:g}" for name in ("beta", "learning_rate") if name in each)])
            points.setdefault(label, {})[each["seed"]] = [each]
        for label, runs in points.items():
            rows.append([label, str(len(runs)), *means(runs, ["kl", *(f"score/{judge}" for judge in judges)])])
        if not points:
            rows.append([method, NOT_RUN, *[""] * (1 + len(judges))])
    return table(["policy: method, beta, learning rate", "seeds", "KL, nats", *judges], rows)


def means(runs: Mapping[int, list[Result]], names: Sequence[str]) -> list[str]:
    """Return the mean over seeds of each figure of one policy, with its interval."""

    def of_policy(each: list[Result], weights: Numbers, name: str) -> Numbers:
        return weighted_mean(each[0], name, weights)

    every = (mean_over_seeds(runs, partial(of_policy, name=name)) for name in names)
    return [figure(value, bounds, 2) for value, bounds, _ in every]


def equal_kl(evidence: Evidence, judge: str, methods: Mapping[str, Sequence[Case]]) -> str:
    """Return the reward of each method at the KLs of the comparison."""
    kls = sorted([evidence.plan.comparison.kl, *evidence.plan.comparison.other_kls])
    rows = []
    for method, cases in methods.items():
        runs, cells = evidence.runs(cases), []
        for kl in kls:
            value, bounds, reached = mean_over_seeds(runs, partial(reward, judge=judge, kl=kl))
            cells.append(at_kl(value, bounds, reached, len(runs)))
        rows.append([method, str(len(runs)) if runs else evidence.missing(cases), *cells])
    return table([judge, "seeds", *(f"at {kl:g} nats" for kl in kls)], rows)


def at_kl(value: float, bounds: Bounds | None, reached: int, seeds: int, *, signed: bool = False) -> str:
    """Return a figure at a KL that some of the complete seeds reach. It is empty if there are no such seeds."""
    if not reached:
        return "not reached" if seeds else ""
    short = f" ({reached} of {seeds} seeds)" if reached < seeds else ""
    return figure(value, bounds, 2, signed=signed) + short


def _mean(results: Sequence[Result], path: str) -> float:
    def get(value: Any) -> float:
        for key in path.split("/"):
            value = value.get(key, 0) if isinstance(value, dict) else value
        return float(value or 0)

    return float(np.mean([get(each) for each in results]))


def compute(evidence: Evidence) -> str:
    """Return reward at the KL of the comparison with compute and labels."""
    comparison, rows = evidence.plan.comparison, []
    for method, cases in evidence.methods("sentences").items():
        runs, done = evidence.runs(cases), evidence.finished(cases)
        if not runs:
            rows.append([method, evidence.missing(cases), "", "", ""])
            continue
        value, bounds, seeds = mean_over_seeds(runs, partial(reward, judge=comparison.judge, kl=comparison.kl))
        rows.append(
            [
                method,
                figure(value, bounds, 2) if seeds else "not reached",
                f"{_mean(done, 'cost/flops') / 1e12:.1f}",
                f"{_mean(done, 'cost/human_pairs'):.0f}",
                f"{_mean(done, 'cost/judged_answers'):.0f}",
            ]
        )
    head = f"{comparison.judge} at {comparison.kl:g} nats"
    return table(["method", head, "TFLOPs", "human pairs", "answers judged in training"], rows)


def cost(evidence: Evidence) -> str:
    """Return tokens, time and memory of a policy of each method, as means."""
    rows = []
    for task in dict.fromkeys(group.task for group in evidence.plan.groups.values()):
        for method, cases in evidence.methods(task).items():
            if not (done := evidence.finished(cases)):
                continue
            tokens = [
                f"{_mean(done, f'cost/{kind}_tokens') / 1e3:.1f}" for kind in ("sampled", "scored", "trained")
            ]
            seconds = [f"{_mean(done, f'seconds/{part}') / 60:.1f}" for part in ("training", "evaluation")]
            peak = f"{max(each['peak_memory_gib'] for each in done):.1f}"
            devices = ", ".join(sorted({device(each) for each in done}))
            rows.append([f"{task}, {method}", *tokens, *seconds, peak, devices])
    columns = ["method", "thousand tokens sampled", "scored", "trained", "minutes of training", "of evaluation",
               "peak memory of training, GiB", "device"]  # fmt: skip
    return table(columns, rows or [[NOT_RUN, *[""] * 7]])


def memory(evidence: Evidence, ppo: Path = PPO) -> str:
    """Return the models that training on the sentences holds, and its peak memory."""
    methods, rows = evidence.methods("sentences"), []
    for method, models in MODELS.items():
        done = evidence.finished(methods[method])
        peak = f"{max(each['peak_memory_gib'] for each in done):.1f}" if done else NOT_RUN
        rows.append([method, ", ".join(models), str(len(models)), peak, device(done[0]) if done else ""])
    held = "policy, value model, reference, reward model"
    measured = json.loads(ppo.read_text()) if ppo.exists() else None
    label = (
        f"PPO of TRL {measured['packages']['trl']}, one step of {measured['answers']} answers"
        if measured
        else "PPO"
    )
    peak = f"{measured['peak_memory_gib']:.1f}" if measured else NOT_RUN
    rows.append([label, held, "4", peak, device(measured) if measured else ""])
    return table(["method", "models in memory", "number", "peak memory, GiB", "device"], rows)


def arithmetic(evidence: Evidence) -> str:
    """Return pass@1 and pass@8 of every policy of the arithmetic problems, as means over seeds."""
    rows = []
    for method, cases in evidence.methods("arithmetic").items():
        for beta in dict.fromkeys(case.trial.beta for case in cases if case.trial):
            done = evidence.finished([case for case in cases if case.trial and case.trial.beta == beta])
            runs = {each["seed"]: [each] for each in done}
            if not runs:
                rows.append([f"{method}, {beta}", NOT_RUN, *[""] * 5])
                continue
            sides = [("score/verifier", 1), ("reference_score/verifier", 1), ("score/verifier", 8)]
            passed = [mean_over_seeds(runs, partial(passes, name=name, k=k)) for name, k in sides]
            cells = [*means(runs, ["kl"]), *(figure(value, bounds, 2) for value, bounds, _ in passed)]
            value, bounds, _ = mean_over_seeds(runs, gain)
            rows.append([f"{method}, {beta}", str(len(runs)), *cells, figure(value, bounds, 2, signed=True)])
    columns = ["policy: method, beta", "seeds", "KL, nats", "pass@1", "of the reference", "pass@8",
               "pass@1 minus that of the reference"]  # fmt: skip
    return table(columns, rows)


def gain(runs: list[Result], weights: Numbers) -> Numbers:
    """Return pass@1 [B] minus that of the reference, on the same problems."""
    policy, reference = (
        passes(runs, weights, name=f"{side}/verifier", k=1) for side in ("score", "reference_score")
    )
    return policy - reference


def passes(runs: list[Result], weights: Numbers, *, name: str, k: int) -> Numbers:
    """Return pass@k [B]: each problem counts once, those with fewer than k answers are left out."""
    prompts = runs[0]["prompts"]
    values = pass_at_k(np.array(prompts["responses"], float), np.array(prompts[name], float), k)
    known = ~np.isnan(values)
    return weights @ np.where(known, values, 0) / np.maximum(weights @ known, 1e-9)


# Comparisons


def difference(
    evidence: Evidence,
    sides: tuple[Sequence[Case], Sequence[Case]],
    judge: str,
    kl: float,
    *,
    bounds: Callable[[Statistic, Mapping[int, int]], Bounds | None] = over_seeds,
) -> tuple[float, Bounds | None, list[int], tuple[list[float], list[float]]]:
    """Return difference, interval and seeds at a KL, and the rewards of both sides, for complete seeds."""
    first, second = (evidence.runs(cases) for cases in sides)
    both = {seed: (first[seed], second[seed]) for seed in first if seed in second}

    def rewards(seed: int, weights: Numbers) -> tuple[Numbers, Numbers]:
        one, other = (reward(runs, weights, judge=judge, kl=kl) for runs in both[seed])
        return one, other

    prompts = {seed: len(one[0]["prompts"]["responses"]) for seed, (one, _) in both.items()}
    points = {seed: [float(side[0]) for side in rewards(seed, np.ones((1, prompts[seed])))] for seed in both}
    known = {seed: prompts[seed] for seed, point in points.items() if not np.isnan(point).any()}
    one, other = ([points[seed][place] for seed in known] for place in range(2))
    if not known:
        return float("nan"), None, [], (one, other)
    around = bounds(lambda seed, weights: np.subtract(*rewards(seed, weights)), known)
    return float(np.mean(one) - np.mean(other)), around, list(known), (one, other)


def primary(evidence: Evidence, judges: Sequence[str]) -> str:
    """Return the primary comparison. The test is made if every seed of the plan is complete, and not before."""
    plan = evidence.plan.comparison
    methods, planned = (plan.better, plan.worse), evidence.plan.groups[plan.group].seeds
    cases = evidence.methods("sentences")
    lines = []
    for judge in (plan.judge, *(each for each in judges if each != plan.judge)):
        value, bounds, seeds, rewards = difference(
            evidence, (cases[plan.better], cases[plan.worse]), judge, plan.kl
        )
        if not seeds:
            lines.append(f"- {judge}: {NOT_RUN}")
            continue
        means = " and ".join(f"{np.mean(side):.3f} ({name})" for name, side in zip(methods, rewards, strict=True))
        text = f"- {judge}: {means}; difference {figure(value, bounds, signed=True)}, {_count(len(seeds), 'seed')}"
        if judge == plan.judge and len(seeds) == len(planned):
            text += f", p = {permutation_p(*rewards):.3f} by permutation of runs"
        elif judge == plan.judge:
            text += f" of {len(planned)}; the test is {NOT_RUN} until all seeds are complete"
        lines.append(text)
    return "\n".join(lines)


def answer(evidence: Evidence, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each comparison of two methods at the KL of the primary one, without a test."""
    plan, lines = evidence.plan.comparison, []
    cases = evidence.methods("sentences")
    for methods in pairs:
        sides = cases.get(methods[0], []), cases.get(methods[1], [])
        value, bounds, seeds, _ = difference(evidence, sides, plan.judge, plan.kl)
        name = f"{methods[0]} minus {methods[1]}"
        if seeds:
            text = f"{figure(value, bounds, signed=True)} ({_count(len(seeds), 'seed')})"
            lines.append(f"- {name} at {plan.kl:g} nats, {plan.judge}: {text}")
        else:
            reached = all(evidence.runs(side) for side in sides)
            lines.append(f"- {name}: " + (f"{plan.kl:g} nats not reached by both" if reached else NOT_RUN))
    return lines


def beside_sigmoid(evidence: Evidence, judges: Sequence[str]) -> str:
    """Return the reward of each loss minus that of `sigmoid` in the same seeds, at two KLs of the comparison.

    These are the KL of the primary comparison and the largest of the others. Fewer than three seeds have an
    interval over prompts alone.
    """
    comparison, losses, rows = evidence.plan.comparison, evidence.losses, []
    sigmoid = losses.pop("sigmoid")
    columns = [(judge, kl) for kl in (comparison.kl, max(comparison.other_kls)) for judge in judges]
    for loss, cases in losses.items():
        seeds, cells = evidence.runs(cases).keys() & evidence.runs(sigmoid), []
        for judge, kl in columns:
            value, bounds, reached, _ = difference(evidence, (cases, sigmoid), judge, kl, bounds=seeds_or_prompts)
            cells.append(at_kl(value, bounds, len(reached), len(seeds), signed=True))
        rows.append([loss, str(len(seeds)) if seeds else evidence.missing(cases), *cells])
    return table(["loss minus sigmoid", "seeds", *(f"{judge} at {kl:g} nats" for judge, kl in columns)], rows)


def _count(number: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
