"""Failure modes, significance tests and the selection of one policy."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.evaluation.bootstrap import bootstrap, holm, mean, paired_test
from dpo.evaluation.settings import CompareSettings

REFERENCE = "reference"
SIGNIFICANCE_LEVEL = 0.05
LOWER_LIMITS = {"chosen_logp_change", "distinct_2_ratio"}  # minima; the other limits are maxima
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class FailureMode:
    """A known failure of preference training, with the metric and the limit that detect it."""

    name: str
    metric: str
    value: float
    limit: float
    detected: bool
    meaning: str


def failure_modes(metrics: Metrics, settings: CompareSettings) -> list[FailureMode]:
    """Return one failure mode per guardrail whose metric is in `metrics`, detected or not."""
    limits = settings.guardrails
    checks = [
        ("likelihood displacement", "chosen_logp_change", -limits.max_displacement,
         "The mean log-prob of the chosen completions fell, so other texts became more likely."),
        ("KL blow-up", "kl", settings.max_kl, "The policy is further from the reference than the KL budget."),
        ("forgetting", "perplexity_ratio", limits.max_perplexity_ratio,
         "The held-out completions are less likely: the policy forgets what supervised fine-tuning taught."),
        ("length exploitation", "length_ratio", limits.max_length_ratio,
         "Responses are longer than the reference's."),
        ("repetition", "repetition_rise", limits.max_repetition_rise,
         "Responses repeat themselves more than the reference's."),
        ("lost diversity", "distinct_2_ratio", limits.min_distinct_ratio,
         "Responses are more alike than the reference's."),
        ("empty responses", "empty", limits.max_empty, "Responses have no visible character."),
        ("unfinished responses", "unfinished_rise", limits.max_unfinished_rise,
         "More responses than the reference's are truncated at max_new_tokens."),
    ]  # fmt: skip
    modes = []
    for name, metric, limit, meaning in checks:
        if (value := metrics.get(metric)) is not None:
            detected = value < limit if metric in LOWER_LIMITS else value > limit
            modes.append(FailureMode(name, metric, value, limit, detected, meaning))
    if "judged_gain" in metrics:
        gain, limit = metrics["judged_gain"], limits.min_judged_gain
        detected = metrics["judged_gain_ci"][1] < limit and metrics["margin"] > 0
        meaning = "The judge prefers the reference's responses although the margin is positive."
        modes.append(FailureMode("over-optimisation", "judged_gain", gain, limit, detected, meaning))
    return modes


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same prompts. The p-value is adjusted for all comparisons (Holm 1979)."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """Name of the better policy, or `tie`."""
        if self.p >= SIGNIFICANCE_LEVEL:
            return "tie"
        return self.first if self.difference > 0 else self.second


def compare_policies(
    outcomes: Mapping[str, Sequence[float]], clusters: Sequence[Hashable], seed: int
) -> list[Comparison]:
    """Compare each policy with the reference and with each other policy, paired by item.

    Each policy has N outcomes against the reference on the same N items in the same order: 1 for better, 0 for
    worse, 0.5 for equal, NaN for unknown, which counts as no difference. The clusters are the items' prompts.
    """
    contestants = {REFERENCE: np.full(len(clusters), 0.5)} | {k: np.asarray(v, float) for k, v in outcomes.items()}
    pairs = [(second, first) for first, second in itertools.combinations(contestants, 2)]
    differences = [np.nan_to_num(contestants[first] - contestants[second]) for first, second in pairs]
    adjusted = holm([paired_test(values.tolist(), clusters, seed) for values in differences])
    comparisons = []
    for (first, second), values, p in zip(pairs, differences, adjusted, strict=True):
        metrics: Any = bootstrap({"difference": mean(values)}, clusters, seed)
        low, high = metrics["difference_ci"]
        comparisons.append(Comparison(first, second, metrics["difference"], low, high, p))
    return comparisons


def select(
    policies: Mapping[str, Metrics], comparisons: Sequence[Comparison], settings: CompareSettings
) -> tuple[str | None, str]:
    """Return the name of the selected policy or None, and the reason in words.

    The policy with the highest `settings.select` among those without a detected failure mode is selected. If
    several have the same value, the one with the lowest KL is selected.
    """
    metric = settings.select
    passed, failed = [], []
    for name, metrics in policies.items():
        detected = [mode for mode in failure_modes(metrics, settings) if mode.detected]
        reasons = [f"{mode.name}: {mode.metric} {mode.value:.3g}, limit {mode.limit:.3g}" for mode in detected]
        if detected:
            failed.append(f"{name} ({'; '.join(reasons)})")
        else:
            passed.append(name)
    if not passed:
        return None, f"No policy is selected, because every policy fails a guardrail: {', '.join(failed)}."
    best = max(passed, key=lambda name: (policies[name][metric], -policies[name]["kl"]))
    low, high = policies[best][f"{metric}_ci"]
    reason = (
        f"{best} has the highest {metric.replace('_', ' ')}, {policies[best][metric]:.3f} "
        f"[{low:.3f}, {high:.3f}], of the policies that pass all guardrails ({len(passed)} of {len(policies)}; "
        f"KL budget {settings.max_kl:g} nats per response)."
    )
    if failed:
        reason += f" Excluded: {', '.join(failed)}."
    tests = [{c.first, c.second} - {best} for c in comparisons if c.verdict == "tie"]
    ties = [name for others in tests if len(others) == 1 for name in others]
    similar = [name for name in ties if name in passed] + ["the reference"] * (REFERENCE in ties)
    if similar:
        tested = "win rate" if "win_rate" in metric else "reward accuracy"
        reason += f" Its {tested} is not significantly different from that of {', '.join(similar)}"
        reason += f" (paired test, p ≥ {SIGNIFICANCE_LEVEL})."
    return best, reason
