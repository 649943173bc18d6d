"""Metrics of held-out preference pairs: accuracy, margins, likelihood and calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit

from dpo.common.errors import InputError
from dpo.evaluation.bootstrap import Statistic, bootstrap, mean, quantile, ratio
from dpo.training.losses import PairBatch
from dpo.training.settings import Trial

if TYPE_CHECKING:
    from torch import Tensor

BINS = 10  # of equal width, for confidences from 0.5 to 1
MAX_PROMPT_SLICES, MIN_PAIRS_PER_PROMPT = 20, 5  # the most frequent prompts are slices


def check_finite(kind: str, rows: pd.DataFrame, *logps: Tensor) -> None:
    """Raise InputError with the id of the first row, called `kind`, that has a log-prob that is not finite."""
    finite = np.logical_and.reduce([each.isfinite().all(1).numpy() for each in logps])
    if not finite.all():
        raise InputError(
            f"{kind} '{rows['id'].iloc[finite.argmin()]}': its log-probs are not finite, so the weights have "
            "diverged; lower the learning rate in params.yaml"
        )


def pair_table(
    pairs: pd.DataFrame, policy: Tensor, reference: Tensor, lengths: Tensor, trial: Trial
) -> pd.DataFrame:
    """Return rewards, margin, loss and log-probs of each held-out pair.

    Args:
        pairs: P rows of the held-out table.
        policy: log pi(y|x) of chosen and rejected, summed over completion tokens, in nats, shape [P, 2].
        reference: log pi_ref(y|x), shape [P, 2].
        lengths: tokens of each completion, shape [P, 2].
        trial: the loss and the beta that the policy was trained with.

    Returns:
        One row per pair: its `id`, `prompt`, `source` and `agreement`; `tokens` of both completions; rewards,
        `margin` and `loss` as defined in `dpo.training.losses`, with all pairs in one step; `initial_loss`, at
        step 0; `correct`, which is 0.5 at a margin of 0; `chosen_logp_change`, policy minus reference; log-probs
        and tokens of each completion.

    Raises:
        InputError: a log-prob is not finite.
    """
    policy, reference = policy.double(), reference.double()
    check_finite("pair", pairs, policy, reference)
    loss, initial_loss = (
        _losses(pairs, PairBatch(logps, reference, lengths), trial) for logps in (policy, reference)
    )
    rewards = trial.loss.rewards(policy, reference, lengths, trial.beta)
    margin = (rewards[:, 0] - rewards[:, 1]).numpy()
    return pairs[["id", "prompt", "source", "agreement"]].assign(
        tokens=lengths.sum(1).numpy(),
        chosen_reward=rewards[:, 0].numpy(),
        rejected_reward=rewards[:, 1].numpy(),
        margin=margin,
        loss=loss,
        initial_loss=initial_loss,
        correct=(np.sign(margin) + 1) / 2,
        chosen_logp_change=(policy - reference)[:, 0].numpy(),
        chosen_logp=policy[:, 0].numpy(),
        rejected_logp=policy[:, 1].numpy(),
        chosen_reference_logp=reference[:, 0].numpy(),
        rejected_reference_logp=reference[:, 1].numpy(),
        chosen_tokens=lengths[:, 0].numpy(),
        rejected_tokens=lengths[:, 1].numpy(),
    )


def _losses(pairs: pd.DataFrame, batch: PairBatch, trial: Trial) -> np.ndarray:
    """Return the loss of each pair. All pairs are one optimizer step."""
    batch = dataclasses.replace(
        batch, agreement=batch.policy.new_tensor(pairs["agreement"].fillna(1.0).to_numpy())
    )
    if "statistics" in trial.loss.needs:
        batch = dataclasses.replace(batch, statistics=trial.loss.statistics(batch, trial.beta))
    return trial.loss(batch, trial.beta).numpy()


def preference_metrics(
    table: pd.DataFrame, seed: int, *, completions: Literal["both", "chosen"]
) -> dict[str, float | list[float]]:
    """Return the metrics of a `pair_table`, each with its 95% interval `*_ci`, resampled by prompt.

    - `reward_accuracy`, `margin`, `chosen_reward`, `rejected_reward`, `loss`, `chosen_logp_change`: means.
      `loss_rise`: loss above the loss at step 0. `margin_p05` to `margin_p95`: quantiles.
      `chosen_logp_fell_share`: share of pairs whose chosen completion is less likely than under the reference.
    - `perplexity`, `reference_perplexity`, per token of the `completions` that supervised fine-tuning imitated;
      `perplexity_ratio`, their quotient.
    - If the data has human agreement: `human_ceiling`, its mean, which is the accuracy of one person against
      another; `ece`, the expected calibration error over ten bins of confidence (Guo et al. 2017, "On Calibration
      of Modern Neural Networks"), see `calibration`; `brier`, E (p - Y)^2 with p = sigmoid(margin), the policy's
      probability that chosen is preferred, and Y ~ Bernoulli(agreement), whether a person prefers chosen.
      Resampling adds noise within the bins, so the interval of `ece` is biased upwards.
    """
    sides = ("chosen", "rejected") if completions == "both" else ("chosen",)
    policy, reference, tokens = (
        sum(table[f"{side}_{name}"] for side in sides) for name in ("logp", "reference_logp", "tokens")
    )
    statistics = {
        "reward_accuracy": mean(table["correct"]),
        "margin": mean(table["margin"]),
        **{f"margin_p{percent:02}": quantile(table["margin"], percent / 100) for percent in (5, 25, 50, 75, 95)},
        **{name: mean(table[name]) for name in ("chosen_reward", "rejected_reward", "chosen_logp_change")},
        "loss": mean(table["loss"]),
        "loss_rise": mean(table["loss"] - table["initial_loss"]),
        "chosen_logp_fell_share": mean((table["chosen_logp_change"] < 0).where(table["chosen_reward"].notna())),
        "perplexity": _exp(ratio(-policy, tokens)),
        "reference_perplexity": _exp(ratio(-reference, tokens)),
        "perplexity_ratio": _exp(ratio(reference - policy, tokens)),
        **_human_agreement(table),
    }
    return {"pairs": len(table), **bootstrap(statistics, table["prompt"].tolist(), seed)}


def perplexity(
    name: str, logps: ArrayLike, tokens: ArrayLike, prompts: Sequence[str], seed: int
) -> dict[str, float | list[float]]:
    """Return the perplexity per token of N completions as `name` with its 95% interval, resampled by prompt."""
    return bootstrap({name: _exp(ratio(-np.asarray(logps, float), tokens))}, prompts, seed)


def _exp(statistic: Statistic) -> Statistic:
    return lambda weights: np.exp(statistic(weights))


def _human_agreement(table: pd.DataFrame) -> dict[str, Statistic]:
    known = table["agreement"].notna()
    agreement = table["agreement"].fillna(0)
    p = expit(table["margin"])
    brier = agreement * (1 - p) ** 2 + (known - agreement) * p**2
    bins = calibration(table).reindex(table.index)
    gap = (bins["confidence"] - bins["agreement"]).fillna(0)
    gaps = [ratio(gap.where(bins["bin"] == number, 0), known) for number in range(BINS)]
    return {
        "human_ceiling": ratio(agreement, known),
        "ece": lambda weights: np.sum([np.abs(gap(weights)) for gap in gaps], axis=0),
        "brier": ratio(brier, known),
    }


def calibration(table: pd.DataFrame) -> pd.DataFrame:
    """Return the policy's confidence in the completion that it prefers, and the share of people who agree.

    `bin` from 0, `confidence` max(p, 1 - p) with p = sigmoid(margin), and `agreement`, the share of people who
    prefer the same completion, 0.5 at a margin of 0. Pairs without agreement are left out; the index is kept.
    """
    table = table[table["agreement"].notna()]
    p = expit(table["margin"])
    confidence = np.maximum(p, 1 - p)
    number = np.minimum((confidence - 0.5) * 2 * BINS, BINS - 1).astype(int)
    agreement = table["correct"] * table["agreement"] + (1 - table["correct"]) * (1 - table["agreement"])
    return pd.DataFrame({"bin": number, "confidence": confidence, "agreement": agreement})


def reliability(table: pd.DataFrame) -> pd.DataFrame:
    """Return the calibration curve of a `pair_table`, without rows if the data has no agreement.

    One row per non-empty bin: its limits `low` and `high`, `pairs`, mean `confidence` and mean `agreement`.
    """
    bins = calibration(table).groupby("bin")
    curve = bins.agg(pairs=("bin", "size"), confidence=("confidence", "mean"), agreement=("agreement", "mean"))
    low = 0.5 + curve.index.to_numpy() / (2 * BINS)
    curve.insert(0, "low", low)
    curve.insert(1, "high", low + 0.5 / BINS)
    return curve.reset_index(drop=True)


def slices(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the main metrics of a `pair_table` by source, by quartile of length, and by prompt.

    One row per slice: `slice` (`source`, `length` or `prompt`), `value`, `pairs`; `reward_accuracy`, `margin` and
    `chosen_logp_change` with the limits `_low` and `_high` of their 95% intervals. Lengths are tokens of both
    completions. Prompts are the 20 most frequent ones with at least five pairs. Intervals are resampled by prompt,
    and in a slice of one prompt by pair.
    """
    columns = {"reward_accuracy": "correct", "margin": "margin", "chosen_logp_change": "chosen_logp_change"}
    rows = []
    for name, value, part in _split(table):
        statistics = {metric: mean(part[column]) for metric, column in columns.items()}
        metrics = bootstrap(statistics, part["prompt"].tolist(), seed)
        rows.append({"slice": name, "value": value, "pairs": len(part), **metrics})
    result = pd.DataFrame(rows)
    for metric in columns:
        limits = result.pop(f"{metric}_ci").map(lambda ends: ends if isinstance(ends, list) else [np.nan] * 2)
        result[[f"{metric}_low", f"{metric}_high"]] = limits.tolist()
    return result


def _split(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for source, part in table.groupby("source"):
        yield "source", str(source), part
    quarter = np.searchsorted(np.quantile(table["tokens"], [0.25, 0.5, 0.75]), table["tokens"])
    for _, part in table.groupby(quarter):
        yield "length", f"{part['tokens'].min()}-{part['tokens'].max()} tokens", part
    counts = table["prompt"].value_counts().head(MAX_PROMPT_SLICES)
    for prompt in counts[counts >= MIN_PAIRS_PER_PROMPT].index:
        yield "prompt", prompt, table[table["prompt"] == prompt]
