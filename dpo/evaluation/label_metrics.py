"""Metrics of held-out labelled rows: whether the sign and the order of implicit rewards agree with the labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dpo.evaluation.bootstrap import Numbers, Statistic, bootstrap
from dpo.evaluation.pair_metrics import check_finite
from dpo.training.losses import PairBatch
from dpo.training.settings import Trial


def label_table(
    rows: pd.DataFrame, policy: Tensor, reference: Tensor, lengths: Tensor, trial: Trial
) -> pd.DataFrame:
    """Return the columns of `pair_table` for labelled rows.

    Args:
        rows: R rows of the held-out table, with the completion in `chosen` if it is desirable, else in `rejected`.
        policy: log pi(y|x) of each completion, and of one that answers another prompt, shape [R, 2]. Without the
            latter, [R, 1], there is no loss.
        reference: log pi_ref(y|x), of the same shape.
        lengths: tokens of each completion, of the same shape.
        trial: the loss and the beta that the policy was trained with.

    Returns:
        One row per labelled row. `margin` is the implicit reward of a desirable completion, and minus that of an
        undesirable one; `correct` is 1 if it is positive. In the columns of the other label, rewards and changes
        are NaN, log-probs and tokens 0.

    Raises:
        InputError: a log-prob is not finite.
    """
    policy, reference = policy.double(), reference.double()
    check_finite("row", rows, policy, reference)
    desirable = rows["chosen"].notna().to_numpy()
    loss, initial_loss = (_losses(logps, reference, lengths, desirable, trial) for logps in (policy, reference))
    own = policy[:, 0], reference[:, 0], lengths[:, 0]
    reward = trial.loss.rewards(*own, trial.beta).numpy()
    logps, reference_logps, tokens = (each.numpy() for each in own)
    margin = np.where(desirable, reward, -reward)
    table = rows[["id", "prompt", "source", "agreement"]].assign(
        tokens=tokens, margin=margin, loss=loss, initial_loss=initial_loss, correct=(np.sign(margin) + 1) / 2
    )
    for side, mask in (("chosen", desirable), ("rejected", ~desirable)):
        table[f"{side}_reward"] = np.where(mask, reward, np.nan)
        for name, values in (("logp", logps), ("reference_logp", reference_logps), ("tokens", tokens)):
            table[f"{side}_{name}"] = np.where(mask, values, 0)
    return table.assign(chosen_logp_change=np.where(desirable, logps - reference_logps, np.nan))


def _losses(
    logps: Tensor, reference: Tensor, lengths: Tensor, desirable: np.ndarray, trial: Trial
) -> np.ndarray | float:
    """Return the loss of each row. All rows are one optimizer step."""
    if logps.shape[1] == 1:
        return np.nan
    labels = torch.from_numpy(desirable).double()
    step = PairBatch(logps, reference, lengths, labels=labels)
    return trial.loss(replace(step, statistics=trial.loss.statistics(step, trial.beta)), trial.beta).numpy()


def label_metrics(table: pd.DataFrame, seed: int) -> dict[str, float | list[float]]:
    """Return `reward_auc` of a `label_table` with its 95% interval, resampled by prompt, or nothing for pairs.

    It is the probability that a random desirable row has a higher implicit reward than a random undesirable one;
    ties count one half. It is left out if all rows have one label.
    """
    desirable = table["rejected_reward"].isna().to_numpy()
    if not (desirable | table["chosen_reward"].isna().to_numpy()).all():
        return {}
    rewards = table["chosen_reward"].fillna(table["rejected_reward"]).to_numpy()
    return bootstrap({"reward_auc": _auc(rewards, desirable)}, table["prompt"].tolist(), seed)


def _auc(rewards: np.ndarray, desirable: np.ndarray) -> Statistic:
    order = np.argsort(rewards, kind="stable")
    _, starts = np.unique(rewards[order], return_index=True)  # of the groups of equal rewards

    def statistic(weights: Numbers) -> Numbers:
        sides = ((weights * mask)[:, order] for mask in (desirable, ~desirable))
        good, bad = (np.add.reduceat(side, starts, axis=1) for side in sides)
        below = bad.cumsum(1) - bad / 2
        pairs = good.sum(1) * bad.sum(1)
        return np.divide((good * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)

    return statistic
