"""From the figures of many policies to one of them, and to the reason in words."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.evaluation.bootstrap import bootstrap, holm, mean, paired_test
from dpo.evaluation.settings import CompareSettings

REFERENCE = "reference"
SIGNIFICANT = 0.05

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Sign:
    """One sign of failure: a figure and the limit that it must keep."""

    name: str
    figure: str
    value: float
    limit: float
    tripped: bool
    meaning: str


def failure_signs(metrics: Metrics, params: CompareSettings) -> list[Sign]:
    """What users of preference training otherwise find in production, tripped or not.

    Args:
        metrics: of one policy, from `preference_metrics` and `answer_metrics`.
        params: limits, and the KL budget.
    """
    limits = params.guardrails
    checks = [
        ("likelihood displacement", "chosen_logp_change", -limits.max_displacement,
         "The mean log-prob of the chosen completions fell, in nats: probability went to texts nobody compared."),
        ("KL blow-up", "kl", params.max_kl, "Answers are further from the reference than the budget allows."),
        ("forgetting", "perplexity_ratio", limits.max_perplexity_ratio,
         "The held-out completions became less likely: what supervised fine-tuning taught is being lost."),
        ("length exploitation", "length_ratio", limits.max_length_ratio, "Answers outgrow the reference's."),
        ("repetition", "repetition_rise", limits.max_repetition_rise, "Answers repeat themselves."),
        ("lost diversity", "distinct_2_ratio", limits.min_distinct_ratio, "Answers resemble one another."),
        ("empty answers", "empty", limits.max_empty, "Answers without a word."),
        ("never-ending answers", "unfinished_rise", limits.max_unfinished_rise,
         "More answers than the reference's do not end by themselves."),
    ]  # fmt: skip
    found = []
    for name, figure, limit, meaning in checks:
        if figure not in metrics:  # the reference's answers have no two words to count, say
            continue
        low_is_bad = figure in ("chosen_logp_change", "distinct_2_ratio")
        value = metrics[figure]
        tripped = value < limit if low_is_bad else value > limit
        found.append(Sign(name, figure, value, limit, tripped, meaning))
    if "judged_gain" in metrics:
        over = metrics["judged_gain_ci"][1] < limits.min_judged_gain and metrics["margin"] > 0
        found.append(
            Sign("over-optimisation", "judged_gain", metrics["judged_gain"], limits.min_judged_gain, over,
                 "The judge likes the answers less than the reference's, though the implicit reward rose.")
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same prompts; the p-value is adjusted for the number of comparisons (Holm 1979)."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """The better one's name, or `tie`."""
        if self.p >= SIGNIFICANT:
            return "tie"
        return self.first if self.difference > 0 else self.second


def compare_policies(
    outcomes: Mapping[str, Sequence[float]], clusters: Sequence[Hashable], seed: int
) -> list[Comparison]:
    """Every policy against the reference and against every other, paired by item.

    Args:
        outcomes: for each policy, N outcomes against the reference on the same N items in the same order: 1 for
            better, 0 for worse, 0.5 for equal, NaN for unknown, which counts as no difference. The reference
            itself is 0.5 everywhere.
        clusters: the prompt of each item.
        seed: of the bootstrap and of the permutations.
    """
    contestants = {REFERENCE: np.full(len(clusters), 0.5)} | {k: np.asarray(v, float) for k, v in outcomes.items()}
    pairs = [(second, first) for first, second in itertools.combinations(contestants, 2)]
    differences = [np.nan_to_num(contestants[first] - contestants[second]) for first, second in pairs]
    adjusted = holm([paired_test(values.tolist(), clusters, seed) for values in differences])
    found = []
    for (first, second), values, p in zip(pairs, differences, adjusted, strict=True):
        figures: Any = bootstrap({"difference": mean(values)}, clusters, seed)
        low, high = figures["difference_ci"]
        found.append(Comparison(first, second, figures["difference"], low, high, p))
    return found


def select(
    policies: Mapping[str, Metrics], comparisons: Sequence[Comparison], params: CompareSettings
) -> tuple[str | None, str]:
    """The policy with the highest `params.select` within the KL budget and without a sign of failure.

    Of equal ones the nearest to the reference is taken.

    Returns:
        (its name or None, the reason in words).
    """
    figure, words = params.select, params.select.replace("_", " ")
    tripped = {
        name: [sign for sign in failure_signs(metrics, params) if sign.tripped]
        for name, metrics in policies.items()
    }
    sound = [name for name, signs in tripped.items() if not signs]
    refused = "; ".join(
        f"{name} ({', '.join(f'{s.name}: {s.figure} {s.value:.3g}, limit {s.limit:.3g}' for s in signs)})"
        for name, signs in tripped.items()
        if signs
    )
    if not sound:
        return None, f"No policy is selected: each shows a sign of failure. {refused}."
    best = max(sound, key=lambda name: (policies[name][figure], -policies[name]["kl"]))
    low, high = policies[best][f"{figure}_ci"]
    reason = (
        f"{best} has the highest {words}, {policies[best][figure]:.3f} [{low:.3f}, {high:.3f}], among the "
        f"{len(sound)} of {len(policies)} policies within {params.max_kl:g} nats an answer of the reference that "
        "show no sign of failure."
    )
    if refused:
        reason += f" Not considered: {refused}."
    ties = [
        c.second if c.first == best else c.first
        for c in comparisons
        if best in (c.first, c.second) and c.verdict == "tie"
    ]
    rivals = [name for name in ties if name in sound]
    if rivals:
        tested = "win rate" if "win_rate" in figure else "reward accuracy"
        what = "" if tested == words else f" in {tested}"
        reason += f" A tie with {', '.join(rivals)}: the paired test tells no difference{what}."
    if REFERENCE in ties:
        reason += " A tie with the reference too: nothing shows yet that it is better."
    return best, reason
