"""KTO: the loss and its KL term against their definitions and TRL 1.16, and training on labelled rows."""

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from dpo.common.errors import InputError
from dpo.engine.logprobs import load_model
from dpo.engine.tokenization import TokenRow, labelled_rows
from dpo.training.losses import Custom, Kto, PairBatch, Sigmoid, check_rows
from dpo.training.train import train_dpo
from tests.support.losses import random_tokens
from tests.support.training import as_labelled, dpo_params, make_reference, trial

LOSS = Kto(desirable_weight=1.5, undesirable_weight=0.5)


def batch(tokens, loss=LOSS, beta=0.3, step=None):
    """Tokens of pairs as labelled rows, desirable if the agreement is above 0.5, in the step `step`."""

    def pairs(of):
        labels = (of.agreement > 0.5).to(of.policy)
        return PairBatch(of.sums(of.policy), of.sums(of.reference), of.lengths, labels=labels)

    with torch.no_grad():
        statistics = loss.statistics(pairs(step or tokens), beta)
    return PairBatch(**vars(pairs(tokens)) | {"statistics": statistics})


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_the_loss_is_that_of_the_paper_in_float64(beta):
    tokens = random_tokens(seed=1)
    pairs = batch(tokens, beta=beta)
    ratios = (pairs.policy - pairs.reference).tolist()
    z = max(0.0, sum(other for _, other in ratios) / len(ratios))
    expected = []
    for (own, _), label in zip(ratios, pairs.labels.tolist(), strict=True):
        value = 1 / (1 + math.exp(-beta * ((own - z) if label else (z - own))))
        expected.append((1.5 if label else 0.5) * (1 - value))
    torch.testing.assert_close(LOSS(pairs, beta), torch.tensor(expected, dtype=torch.float64))


def trl_loss(tokens, beta):
    """The mean loss of TRL's KTOTrainer, and its gradient in the log-probs of the policy's tokens."""
    from trl import KTOTrainer

    leaf, width = tokens.policy.clone().requires_grad_(), int(tokens.lengths.max())

    def padded(values, side):
        return torch.stack([pad(part, (0, width - len(part))) for part in tokens.parts(values)[side::2]])

    def outputs(values):
        count = len(tokens.lengths)
        both = iter([1, 0])  # the completion of another prompt is computed first
        zeros = torch.zeros(count, width)
        return lambda **_: SimpleNamespace(log_probs=padded(values, next(both)), entropy=zeros, mean_logits=zeros)

    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=model, ref_model=outputs(tokens.reference), accelerator=accelerator, aux_loss_enabled=False,
        precompute_ref_logps=False, calculate_KL=True, loss_type="kto", beta=beta, desirable_weight=1.5,
        undesirable_weight=0.5, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer._compute_kl_logps = lambda model, inputs: KTOTrainer._compute_kl_logps(trainer, model, inputs)
    mask = pad(padded(torch.ones_like(tokens.policy), 0), (1, 0)).long()
    inputs = {
        prefix + name: value
        for prefix in ("", "KL_")
        for name, value in (("input_ids", mask), ("attention_mask", mask), ("completion_mask", mask))
    } | {"label": tokens.agreement > 0.5}
    loss = KTOTrainer._compute_loss(trainer, outputs(leaf), inputs, return_outputs=False)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, trainer._metrics["train"]["kl"][0]


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_trl(seed):
    tokens = random_tokens(seed=seed, dtype=torch.float32)
    expected, gradient, kl = trl_loss(tokens, 0.3)
    leaf = tokens.policy.clone().requires_grad_()
    pairs = batch(tokens.__class__(leaf, *list(vars(tokens).values())[1:]))
    loss = LOSS(pairs, 0.3).mean()
    (ours,) = torch.autograd.grad(loss, leaf)
    assert pairs.statistics["kl"].item() == pytest.approx(kl, abs=1e-5)
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-5)


def gradient(tokens, labels, beta=0.3, loss=LOSS):
    """The gradient of the sum of the losses in r(y) of each row, with the KL term of these rows."""
    policy = tokens.sums(tokens.policy).requires_grad_()
    pairs = PairBatch(policy, tokens.sums(tokens.reference), tokens.lengths, labels=labels.to(policy))
    with torch.no_grad():
        pairs = dataclasses.replace(pairs, statistics=loss.statistics(pairs, beta))
    loss(pairs, beta).sum().backward()
    assert (policy.grad[:, 1] == 0).all(), "the completion of another prompt has no gradient"
    return policy.grad[:, 0]


def test_gradients_raise_desirable_and_lower_undesirable_completions():
    tokens = random_tokens(seed=5)
    labels = tokens.agreement > 0.5
    slopes = gradient(tokens, labels)
    assert (slopes[labels] < 0).all()
    assert (slopes[~labels] > 0).all()
    # A completion with both labels has no gradient, if the weights are equal.
    both = gradient(tokens, labels, loss=Kto()) + gradient(tokens, ~labels, loss=Kto())
    torch.testing.assert_close(both, torch.zeros_like(both), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.01, 3.0])
def test_the_loss_is_a_function_of_beta_times_the_log_ratios(beta):
    tokens = random_tokens(seed=9)
    scaled = dataclasses.replace(tokens, policy=tokens.reference + beta * (tokens.policy - tokens.reference))
    torch.testing.assert_close(LOSS(batch(tokens, beta=beta), beta), LOSS(batch(scaled, beta=1.0), 1.0))


@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_and_order_do_not_change_the_losses(size):
    tokens = random_tokens(seed=8)
    losses = LOSS(batch(tokens), 0.3)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).tolist()
    for start in range(0, 24, size):
        places = order[start : start + size]
        torch.testing.assert_close(LOSS(batch(tokens.select(places), step=tokens), 0.3), losses[places])


def test_the_kl_term_is_the_divergence_of_a_tabular_policy():
    # Prompts do not matter to this policy, so completions that other prompts drew from it have the expectation KL.
    generator = torch.Generator().manual_seed(0)
    reference, policy = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(1)
    kl = (policy.exp() * (policy - reference)).sum()
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    step = PairBatch(
        *(table[drawn][:, None].repeat(1, 2) for table in (policy, reference)), torch.ones(len(drawn), 2),
        labels=torch.ones(len(drawn)),
    )  # fmt: skip
    ratio = policy - reference
    error = ((policy.exp() * ratio**2).sum() - kl**2).sqrt() / math.sqrt(len(drawn))
    assert kl > 0.1
    assert abs(Kto().statistics(step, 0.1)["kl"] - kl) < 4 * error
    opposite = PairBatch(step.reference, step.policy, step.lengths, labels=step.labels)
    assert Kto().statistics(opposite, 0.1)["kl"] == 0


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_answers_are_ranked_by_the_share_of_people_who_like_them(beta):
    reference = torch.full((1, 4), 0.25, dtype=torch.float64).log()
    liked = torch.tensor([0.9, 0.7, 0.3, 0.1], dtype=torch.float64)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        logps = logits.log_softmax(1)[0]
        both = torch.stack([logps, logps.detach()], 1)
        sides = []
        for label, share in ((1.0, liked), (0.0, 1 - liked)):
            pairs = PairBatch(
                both, reference[0][:, None].repeat(1, 2), torch.ones(4, 2), labels=torch.full((4,), label),
                statistics={"kl": torch.zeros(())},
            )  # fmt: skip
            sides.append((share * Kto()(pairs, beta)).sum())
        sum(sides).backward()
        optimizer.step()
    ratios = (logits.log_softmax(1) - reference).detach()[0]
    assert (ratios.diff() < 0).all()
    assert ratios[0] > 0 > ratios[-1]


def test_the_second_completion_is_of_another_prompt_and_fits():
    def row(name, prompt, *completion):
        return TokenRow(name, prompt, (completion,)), name.isupper()

    rows = [
        row("A", (1,), 11),
        row("b", (1,), 12, 13),
        row("c", (2, 2), 14),
        row("D", (3,), 15),
        row("e", (3,), 16),
    ]
    made = list(labelled_rows(rows, 3, "data"))
    assert [each.completions for each in made] == [
        ((11,), (14,)), ((12, 13), (14,)), ((14,), (12,)), ((15,), (14,)), ((16,), (14,))
    ]  # fmt: skip
    assert [each.desirable for each in made] == [True, False, False, True, False]
    assert len({each.digest for each in made}) == 5
    with pytest.raises(InputError, match="data: all rows have the same prompt"):
        list(labelled_rows(rows[:2], 3, "data"))
    assert list(labelled_rows([], 3, "data")) == []


def test_training_separates_the_labels_whatever_the_micro_batches(tiny_model_dir, rows):
    labelled = as_labelled(rows[:8])
    reference = make_reference(tiny_model_dir, labelled)
    logs, weights = [], []
    for budget in (60, 2000):
        model = load_model(tiny_model_dir)
        logs.append(
            train_dpo(
                model, labelled, reference, dpo_params(epochs=4), trial(loss=Kto(), beta=0.5),
                max_tokens_per_microbatch=budget,
            )
        )  # fmt: skip
        weights.append(model.model.get_output_embeddings().weight.detach())
    first, last = logs[0][0], logs[0][-1]
    assert first["loss"] == pytest.approx(0.5)
    assert first["kl"] == 0
    assert last["loss"] < 0.45
    assert last["rewards/chosen"] > last["rewards/rejected"]
    for ours, theirs in zip(*logs, strict=True):
        shared = {key: value for key, value in ours.items() if key != "epoch"}
        assert shared == pytest.approx({key: theirs[key] for key in shared}, rel=1e-3, abs=1e-4)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_a_step_of_one_label_logs_no_figures_of_the_other(tiny_model_dir, rows):
    labelled = [row for row in as_labelled(rows[:8]) if row.desirable]
    log = train_dpo(
        load_model(tiny_model_dir), labelled, make_reference(tiny_model_dir, labelled), dpo_params(),
        trial(loss=Kto()), max_tokens_per_microbatch=200,
    )  # fmt: skip
    assert all("rewards/chosen" in entry and "rewards/rejected" not in entry for entry in log)


@pytest.mark.parametrize("loss", [Sigmoid(), Custom(function="tests.support.losses:smooth")])
def test_a_loss_of_pairs_does_not_train_on_labels_and_kto_not_on_pairs(loss):
    with pytest.raises(InputError, match=f"sweep.losses: {loss.name} needs pairs, .*data.pair_labels"):
        check_rows([Kto(), loss], labelled=True)
    with pytest.raises(InputError, match=r"sweep\.losses: kto needs rows of one completion with a label"):
        check_rows([loss, Kto()], labelled=False)
    check_rows([Kto()], labelled=True)
    check_rows([loss], labelled=False)
