"""Failure modes, significance tests and the selection of one policy."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dpo.evaluation.bootstrap import bootstrap, holm, mean, paired_test
from dpo.evaluation.settings import CompareSettings

REFERENCE = "reference"
SIGNIFICANCE_LEVEL = 0.05
LOWER_LIMITS = {"min_kl", "max_displacement", "min_distinct_ratio"}  # minima; the other limits are maxima
NO_EFFECT = "no effect"
CHECKS = [
    (NO_EFFECT, "kl", "min_kl", "Nothing was learned: the policy equals the reference."),
    (NO_EFFECT, "unchanged", "max_unchanged", "Nothing was learned: the responses equal the reference's."),
    ("worse than the reference", "loss_rise", "max_loss_rise",
     "The held-out loss is above the loss at step 0, when the policy equals the reference."),
    ("likelihood displacement", "chosen_logp_change", "max_displacement",
     "The mean log-prob of the chosen completions fell, so other texts became more likely."),
    ("KL blow-up", "kl", "max_kl", "The policy is further from the reference than the KL budget."),
    ("forgetting", "perplexity_ratio", "max_perplexity_ratio",
     "The held-out completions are less likely: the policy forgets what supervised fine-tuning taught."),
    ("length exploitation", "length_ratio", "max_length_ratio", "Responses are longer than the reference's."),
    ("repetition", "repetition_rise", "max_repetition_rise",
     "Responses repeat themselves more than the reference's."),
    ("lost diversity", "distinct_2_ratio", "min_distinct_ratio", "Responses are more alike than the reference's."),
    ("empty responses", "empty", "max_empty", "Responses have no visible character."),
    ("unfinished responses", "unfinished", "max_unfinished",
     "Responses are truncated at evaluate.max_new_tokens; raise it, or set it to auto."),
    ("unfinished reference", "reference_unfinished", "max_unfinished",
     "The reference's responses are truncated at evaluate.max_new_tokens; raise it, or set it to auto."),
    ("rise of unfinished responses", "unfinished_rise", "max_unfinished_rise",
     "More responses than the reference's are truncated at evaluate.max_new_tokens."),
]  # fmt: skip
"""Name of each failure mode, the metric, the limit's name in the settings, and the meaning."""
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
    modes = []
    for name, metric, key, meaning in CHECKS:
        limit = settings.max_kl if key == "max_kl" else getattr(limits, key)
        limit = -limit if key == "max_displacement" else limit
        if (value := metrics.get(metric)) is not None:
            detected = value < limit if key in LOWER_LIMITS else value > limit
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


@dataclass(frozen=True)
class Selection:
    """The selected policy, if any, the verdict in one sentence, the reason, and the test against the reference."""

    name: str | None
    verdict: str
    reason: str
    against_reference: Literal["better", "tie", "worse"] | None = None


def select(
    policies: Mapping[str, Metrics], comparisons: Sequence[Comparison], settings: CompareSettings
) -> Selection:
    """Select a policy among those without a detected failure mode.

    The best policy has the highest `settings.select`. With `settings.ties` at `least_kl`, the policy with the
    least KL is selected of the best one and those that the paired test does not separate from it; if the best
    policy beats the reference, only of those that beat it too. With `highest`, the best policy is selected.
    """
    passed, failed = [], {}
    for name, metrics in policies.items():
        detected = [mode for mode in failure_modes(metrics, settings) if mode.detected]
        if detected:
            failed[name] = detected
        else:
            passed.append(name)
    excluded = ", ".join(f"{name} ({_limits_exceeded(modes)})" for name, modes in failed.items())
    if not passed:
        learned = any(NO_EFFECT not in [mode.name for mode in modes] for modes in failed.values())
        prefix = "" if learned else "Nothing was learned. "
        verdict = f"{prefix}No policy is selected, because every policy fails a guardrail"
        return Selection(None, f"{verdict}.", f"{verdict}: {excluded}.")
    metric = settings.select
    best = max(passed, key=lambda name: (policies[name][metric], -policies[name]["kl"]))
    verdicts = {frozenset((c.first, c.second)): c.verdict for c in comparisons}
    against = {name: verdicts.get(frozenset((name, REFERENCE)), "tie") for name in passed}
    tied = [name for name in passed if verdicts.get(frozenset((name, best))) == "tie"]
    candidates = [best, *(name for name in tied if against[best] != best or against[name] == name)]
    selected = best if settings.ties == "highest" else min(candidates, key=lambda name: policies[name]["kl"])
    reason = (
        f"{best} has the highest {metric.replace('_', ' ')}, {_interval(policies[best], metric)}, of the policies "
        f"that pass all guardrails ({len(passed)} of {len(policies)}; KL budget {settings.max_kl:g} nats per "
        "response)."
    )
    if tied:
        reason += f" The paired test does not separate it from {', '.join(tied)} (p ≥ {SIGNIFICANCE_LEVEL})."
    if selected != best:
        least = f"{policies[selected]['kl']:.2f} nats per response"
        beating = " that beat the reference" if against[best] == best else ""
        reason += f" Of these policies{beating}, {selected} has the least KL, {least}, and is selected."
    if excluded:
        reason += f" Excluded: {excluded}."
    outcome = against[selected]
    word: Any = "better" if outcome == selected else "worse" if outcome == REFERENCE else "tie"
    verdict = _against_reference(selected, word, policies[selected], settings)
    return Selection(selected, verdict, f"{reason} {verdict}", word)


def _limits_exceeded(modes: Sequence[FailureMode]) -> str:
    return "; ".join(f"{mode.name}: {mode.metric} {mode.value:.3g}, limit {mode.limit:.3g}" for mode in modes)


def _interval(metrics: Metrics, metric: str) -> str:
    low, high = metrics[f"{metric}_ci"]
    return f"{metrics[metric]:.3f} [{low:.3f}, {high:.3f}]"


def _against_reference(selected: str, outcome: str, metrics: Metrics, settings: CompareSettings) -> str:
    metric = tested_metric(settings)
    figure = f"{metric.replace('_', ' ')} {_interval(metrics, metric)}" if metric in metrics else metric
    if outcome == "tie":
        return f"{selected} is not significantly different from the reference: {figure}."
    return f"{selected} is {outcome} than the reference: {figure}."


def tested_metric(settings: CompareSettings) -> str:
    """Return the metric whose outcomes the paired tests compare."""
    return "win_rate" if "win_rate" in settings.select else "reward_accuracy"
