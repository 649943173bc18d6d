"""Metrics by hand, samples under padding, judges by name."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from dpo.errors import InputError
from dpo.evaluation.judges import load_judge, vader_compound
from dpo.evaluation.preferences import judged_metrics, mean_interval, preference_metrics, sample_metrics
from dpo.evaluation.sampling import sample
from dpo.logps import load_model


def test_preference_metrics_by_hand():
    # beta 0.5: margins 0.5*((1)-(-1)) = 1, 0.5*((-2)-(0)) = -1, and 0 for the untouched pair (half right).
    reference = torch.tensor([[-10.0, -10.0], [-10.0, -10.0], [-5.0, -7.0]])
    policy = torch.tensor([[-9.0, -11.0], [-12.0, -10.0], [-5.0, -7.0]])
    metrics = preference_metrics(policy, reference, 0.5, seed=0)
    assert metrics["reward_accuracy"] == 0.5
    assert metrics["margin"] == 0.0
    assert metrics["chosen_reward"] == pytest.approx((0.5 - 1.0) / 3)
    assert metrics["rejected_reward"] == pytest.approx(-0.5 / 3)
    losses = [math.log1p(math.exp(-margin)) for margin in (1, -1, 0)]
    assert metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert metrics["chosen_logp_change"] == pytest.approx(-1 / 3)
    assert metrics["chosen_logp_fell_share"] == pytest.approx(1 / 3)
    low, high = metrics["margin_ci"]
    assert -1 <= low < 0 < high <= 1


def test_a_policy_equal_to_its_reference_is_neither_right_nor_wrong():
    logps = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 50
    metrics = preference_metrics(logps, logps.clone(), 0.1, seed=0)
    assert metrics["reward_accuracy"] == 0.5
    assert metrics["margin"] == 0.0
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_kl_estimate_on_a_tabular_policy():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=generator).log_softmax(1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    draws = torch.multinomial(policy.exp(), 20_000, replacement=True, generator=generator)
    metrics = sample_metrics(policy[draws], reference[draws], [1] * len(draws), seed=0)
    error = (policy - reference)[draws].std().item() / math.sqrt(len(draws))
    assert abs(metrics["kl"] - exact) < 3 * error
    assert metrics["kl_ci"][0] < exact < metrics["kl_ci"][1]
    assert metrics["kl_per_token"] == pytest.approx(metrics["kl"])


def test_wins_count_one_and_ties_half():
    metrics = judged_metrics([0.9, 0.1, 0.3, 0.5], [0.1, 0.9, 0.3, 0.2], seed=0)
    assert metrics["win_rate"] == 2.5 / 4
    assert metrics["tie_rate"] == 1 / 4
    assert metrics["reward"] == pytest.approx(0.45)
    assert metrics["reference_reward"] == pytest.approx(0.375)


def test_interval_covers_the_mean_of_a_known_distribution():
    generator = torch.Generator().manual_seed(1)
    tries = [torch.randn(60, generator=generator).tolist() for _ in range(200)]
    covered = sum(
        low < 0 < high for low, high in (mean_interval(values, seed) for seed, values in enumerate(tries))
    )
    assert 180 <= covered <= 199
    assert mean_interval([3.0, 3.0], 0) == [3.0, 3.0]


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_answers_do_not_depend_on_the_padding_of_their_neighbours(tiny_model_dir, tokenizer):
    model = load_model(str(tiny_model_dir))
    settings = {"max_new_tokens": 8, "temperature": 1e-4, "seed": 3}
    prompts = ["short", "a much longer prompt about a film that was long", "short"]
    together = sample(model, tokenizer, prompts, **settings)
    alone = [sample(model, tokenizer, [prompt], **settings)[0] for prompt in prompts]
    assert together == alone
    assert together[0] == together[2]


def test_same_seed_same_answers_and_no_token_after_the_end(tiny_model_dir, tokenizer):
    model = load_model(str(tiny_model_dir))
    settings = {"max_new_tokens": 30, "temperature": 3.0}
    prompts = ["film"] * 64
    first = sample(model, tokenizer, prompts, **settings, seed=3)
    assert first == sample(model, tokenizer, prompts, **settings, seed=3)
    assert first != sample(model, tokenizer, prompts, **settings, seed=4)
    end = tokenizer.eos_token_id
    assert any(len(answer) < 30 for answer in first)
    assert all(end not in answer[:-1] for answer in first)
    assert all(len(answer) == 30 or answer[-1] == end for answer in first)


def test_judges_are_found_by_name():
    judge = load_judge("dpo.evaluation.judges:vader_compound")
    assert judge is vader_compound
    good, bad = judge(["What a wonderful, moving film.", "A dreadful, boring mess."])
    assert -1 <= bad < 0 < good <= 1
    for name in ("nothing", "dpo.evaluation.judges:absent", "no.such.module:f", ""):
        with pytest.raises(InputError, match=r"evaluate\.judge"):
            load_judge(name)
