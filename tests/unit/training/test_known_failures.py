"""The failures that docs/reference/losses.md derives from equations, and that its tables have every loss."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpo.training.losses import LOSSES, Conservative, Dpop, Kto, LdDpo, Nca, PairBatch, SppoHard
from tests.support.losses import EXAMPLES, loss_and_gradient, random_tokens

PAGE = (Path(__file__).parents[3] / "docs/reference/losses.md").read_text()
BETA = 0.2


@pytest.mark.parametrize("section", ["Equations", "Beta and learning rate", "Known failures"])
def test_every_table_has_every_loss(section):
    table = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    first = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = set(re.findall(r"`(\w+)`", " ".join(first)))
    assert named - {"custom"} == set(LOSSES) - {"custom"}
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.startswith("| `")]
    assert all(row[-1].strip() or "no source known" in "".join(row) for row in rows)


def at(name, chosen, rejected):
    """Loss of a pair with log-ratios r(y_w) and r(y_l), and its gradients in both. Completions have one token."""
    logps = torch.tensor([chosen, rejected], dtype=torch.float64) - 30
    tokens = replace(random_tokens(1), policy=logps, reference=torch.full_like(logps, -30.0))
    tokens = replace(tokens, collisions=logps.clone(), lengths=torch.ones(1, 2, dtype=torch.long))
    tokens = replace(tokens, agreement=torch.tensor([0.8], dtype=torch.float64))
    losses, gradient = loss_and_gradient(EXAMPLES.get(name, name), tokens, BETA)
    return losses.item(), gradient.tolist()


@pytest.mark.parametrize(
    "name",
    ["sigmoid", "ipo", "conservative", "robust", "hinge", "length_normalised", "ld_dpo", "exo", "discopop", "aot"],
)
def test_the_loss_does_not_see_that_both_completions_become_less_likely(name):
    loss, gradient = at(name, 1.0, 0.5)
    fallen, same = at(name, -9.0, -9.5)
    assert fallen == pytest.approx(loss, rel=1e-9)
    assert same == pytest.approx(gradient, rel=1e-9)


@pytest.mark.parametrize("name", ["simpo", "orpo", "sft"])
def test_no_term_keeps_the_policy_near_the_reference(name):
    tokens = random_tokens(seed=3)
    other = replace(tokens, reference=tokens.reference - 5)
    both = (loss_and_gradient(EXAMPLES[name], each, BETA) for each in (other, tokens))
    for ours, expected in zip(*both, strict=True):
        assert torch.equal(ours, expected)


def test_conservative_pushes_large_margins_back():
    target = math.log(0.9 / 0.1) / BETA
    (below, _), (there, _), (above, _) = (
        at(Conservative(label_smoothing=0.1), target + shift, 0.0)[1] for shift in (-1.0, 0.0, 1.0)
    )
    assert below < 0 < above
    assert there == pytest.approx(0, abs=1e-12)


def test_robust_has_no_lower_bound():
    values = [at("robust", h, 0.0)[0] for h in (10.0, 100.0, 1000.0)]
    assert values[0] < 0
    # e beta h / (1 - 2 e) with e = 0.2
    assert values[2] == pytest.approx(-0.2 * BETA * 1000 / 0.6)


def test_hinge_has_no_gradient_above_a_margin_of_1():
    assert at("hinge", 1.01 / BETA, 0.0)[1] == [0, 0]
    assert at("hinge", 0.99 / BETA, 0.0)[1] == [-BETA, BETA]


def test_dpop_mostly_raises_chosen():
    chosen, rejected = at(Dpop(penalty=50.0), -0.1, 0.0)[1]
    assert chosen / -rejected == pytest.approx(51)
    chosen, rejected = at(Dpop(penalty=50.0), 0.1, 0.0)[1]
    assert chosen / -rejected == pytest.approx(1)


def test_apo_zero_raises_and_apo_down_ignores_chosen_at_the_start():
    assert at("apo_zero", 0.0, 0.0)[1][0] < 0
    assert at("apo_down", 0.0, 0.0)[1][0] == pytest.approx(0, abs=1e-12)


def test_wpo_hardly_trains_on_what_the_policy_would_not_write():
    tokens = random_tokens(seed=4)
    unlikely = replace(tokens, policy=tokens.policy - 3, reference=tokens.reference - 3)
    _, gradient = loss_and_gradient(EXAMPLES["wpo"], tokens, BETA)
    _, small = loss_and_gradient(EXAMPLES["wpo"], unlikely, BETA)
    torch.testing.assert_close(small, gradient * math.exp(-6))


def test_ld_dpo_hardly_learns_the_end_of_the_longer_completion():
    tokens = random_tokens(seed=4)
    _, gradient = loss_and_gradient(LdDpo(alpha=0.01), tokens, BETA)
    excess = 0
    for (chosen, rejected), sides in zip(
        tokens.lengths.tolist(), zip(*[iter(tokens.parts(gradient))] * 2, strict=True), strict=True
    ):
        shared = min(chosen, rejected)
        for side in sides:
            torch.testing.assert_close(side[shared:], 0.01 * side[0].expand(len(side) - shared))
            excess += len(side) - shared
    assert excess > 0


def test_exo_hardly_trains_on_a_very_wrong_order_and_dpo_does():
    slopes = {name: [abs(at(name, h / BETA, 0.0)[1][0]) for h in (0.0, -20.0)] for name in ("exo", "sigmoid")}
    assert slopes["exo"][1] < 1e-6 * slopes["exo"][0]
    assert slopes["sigmoid"][1] > slopes["sigmoid"][0]


def test_nca_lowers_chosen_above_a_reward_of_log_2():
    (below, _), (there, _), (above, _) = (at(Nca(), (math.log(2) + x) / BETA, 0.0)[1] for x in (-0.1, 0.0, 0.1))
    assert below < 0 < above
    assert there == pytest.approx(0, abs=1e-12)


def test_sppo_has_the_same_targets_for_every_pair():
    assert at(SppoHard(), 0.5 / BETA, -0.5 / BETA) == (0.0, [0.0, 0.0])


def test_aot_unpaired_compares_completions_of_different_prompts():
    tokens = random_tokens(seed=4)
    _, gradient = loss_and_gradient(EXAMPLES["aot_unpaired"], tokens, BETA)
    moved = tokens.reference.clone()
    moved[: tokens.lengths[0].sum()] -= 2  # of the first pair
    _, changed = loss_and_gradient(EXAMPLES["aot_unpaired"], replace(tokens, reference=moved), BETA)
    others = tokens.lengths[0].sum()
    assert (gradient[others:] != changed[others:]).any()


def test_kto_hardly_trains_on_very_wrong_rewards():
    policy = torch.tensor([[0.0, 0.0], [-20.0 / BETA, 0.0]], dtype=torch.float64, requires_grad=True)
    pairs = PairBatch(policy, torch.zeros(2, 2), torch.ones(2, 2), labels=torch.ones(2))
    statistics = Kto().statistics(replace(pairs, policy=policy.detach()), BETA)
    Kto()(replace(pairs, statistics=statistics), BETA).sum().backward()
    middle, wrong = policy.grad[:, 0].abs().tolist()
    assert wrong < 1e-6 * middle
