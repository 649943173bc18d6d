"""Metrics of held-out labelled rows against their definitions."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from dpo.common.errors import InputError
from dpo.evaluation.label_metrics import label_metrics, label_table
from dpo.evaluation.pair_metrics import pair_table
from dpo.training.losses import Kto, Sigmoid
from dpo.training.settings import Trial

TRIAL = Trial(loss=Kto(desirable_weight=2.0), beta=0.5, learning_rate=1e-5, seed=0)
DESIRABLE = [True, False, True, False]
POLICY = torch.tensor([[-4.0, -9.0], [-6.0, -9.0], [-7.0, -9.0], [-3.0, -9.0]])
REFERENCE = torch.tensor([[-5.0, -10.0], [-5.0, -10.0], [-5.0, -10.0], [-5.0, -10.0]])


def held_out(desirable=DESIRABLE):
    rows = pd.DataFrame({"id": [f"row {i}" for i in range(len(desirable))], "prompt": "a", "source": None})
    rows["prompt"] = [f"prompt {i}" for i in range(len(rows))]
    rows["chosen"] = ["text" if label else None for label in desirable]
    rows["rejected"] = [None if label else "text" for label in desirable]
    return rows.assign(agreement=np.nan)


def table(policy=POLICY, reference=REFERENCE):
    return label_table(held_out(), policy, reference, torch.full_like(policy, 3, dtype=torch.long), TRIAL)


def test_margins_have_the_sign_of_the_label_and_losses_are_those_of_kto():
    found = table()
    assert found["margin"].tolist() == [0.5, 0.5, -1.0, -1.0]  # beta 0.5 times r(y) of 1, -1, -2 and 2
    assert found["correct"].tolist() == [1, 1, 0, 0]
    # z is the mean of r(y'), 1: w s(-beta (r - z)) for desirable, w s(beta (r - z)) for undesirable rows
    expected = [2 / 2, 1 / (1 + math.exp(1.0)), 2 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-0.5))]
    assert found["loss"].tolist() == pytest.approx(expected)
    assert found["initial_loss"].tolist() == [1.0, 0.5, 1.0, 0.5]


def test_columns_of_the_other_label_are_empty():
    found = table()
    mask = np.array(DESIRABLE)
    for side, own, rewards in (("chosen", mask, [0.5, -1.0]), ("rejected", ~mask, [-0.5, 1.0])):
        assert found[f"{side}_reward"].notna().tolist() == own.tolist()
        assert found.loc[own, f"{side}_reward"].tolist() == rewards
        assert (found.loc[~own, [f"{side}_logp", f"{side}_reference_logp", f"{side}_tokens"]] == 0).all(axis=None)
    assert found.loc[mask, "chosen_logp_change"].tolist() == [1.0, -2.0]
    assert found.loc[~mask, "chosen_logp_change"].isna().all()


def test_without_a_completion_of_another_prompt_there_is_no_loss_and_the_same_margins():
    single = table(POLICY[:, :1], REFERENCE[:, :1])
    assert single["loss"].isna().all()
    assert single["margin"].tolist() == table()["margin"].tolist()


def test_a_log_prob_that_is_not_finite_is_an_error_that_names_the_row():
    broken = POLICY.clone()
    broken[2, 0] = math.nan
    with pytest.raises(InputError, match="row 'row 2': its log-probs are not finite"):
        table(broken)


def test_the_auc_is_the_share_of_desirable_and_undesirable_rows_in_the_right_order():
    generator = np.random.default_rng(3)
    desirable = generator.random(40) < 0.4
    ratios = torch.from_numpy(generator.integers(-3, 4, 40).astype(float))  # with ties
    policy = torch.stack([ratios - 5, torch.full_like(ratios, -5)], 1)
    reference, lengths = torch.full_like(policy, -5), torch.ones_like(policy)
    found = label_metrics(label_table(held_out(desirable), policy, reference, lengths, TRIAL), seed=1)
    good, bad = (ratios.numpy()[mask] for mask in (desirable, ~desirable))
    expected = np.mean([(np.sign(one - other) + 1) / 2 for one, other in itertools.product(good, bad)])
    assert found["reward_auc"] == pytest.approx(expected)
    low, high = found["reward_auc_ci"]
    assert low < expected < high


def test_pairs_have_no_auc():
    trial = Trial(loss=Sigmoid(), beta=0.1, learning_rate=1e-5, seed=0)
    lengths = torch.full_like(POLICY, 3, dtype=torch.long)
    assert label_metrics(pair_table(held_out(), POLICY, REFERENCE, lengths, trial), seed=1) == {}
