"""KL to the reference against plain forward passes and against a tabular language model with known KL."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.engine.logprobs import load_model
from dpo.evaluation import kl as module
from dpo.evaluation.kl import divergence
from tests.support.models import make_model

VOCABULARY = 24


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folders(request, tmp_path_factory):
    """Two random models of one architecture."""
    return [
        make_model(request.param, tmp_path_factory.mktemp(str(seed)) / "m", seed, vocab_size=VOCABULARY)
        for seed in (1, 2)
    ]


def random_responses(count, seed=0, max_length=7):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, max_length + 1, (2, count), generator=generator).tolist()
    draw = lambda n: torch.randint(VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in lengths[0]]
    return [prompts[i // 3 * 3] for i in range(count)], [draw(n) for n in lengths[1]]


def by_plain_forward(policy, reference, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        p, q = (m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(1) for m in (policy, reference))
    targets = torch.tensor(response)[:, None]
    return {
        "policy_logp": p.gather(1, targets).sum().item(),
        "reference_logp": q.gather(1, targets).sum().item(),
        "kl": (p.exp() * (p - q)).sum().item(),
        "entropy": -(p.exp() * p).sum().item(),
    }


@pytest.mark.parametrize("max_tokens_per_microbatch", [1, 20, 10_000])
def test_kl_equals_the_plain_forward_pass_in_float64_in_the_order_of_the_responses(
    folders, max_tokens_per_microbatch
):
    prompts, responses = random_responses(17)
    plain = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
    table = divergence(*map(load_model, folders), prompts, responses, max_tokens_per_microbatch)
    assert list(table.index) == list(range(17))
    for row, prompt, response in zip(table.to_dict("records"), prompts, responses, strict=True):
        assert row == pytest.approx(by_plain_forward(*plain, prompt, response), rel=1e-4, abs=1e-4)
    assert (table["kl"] > 0).all()


def test_models_without_packing_give_the_same_kl(folders, monkeypatch):
    prompts, responses = random_responses(9, seed=1)
    packed = divergence(*map(load_model, folders), prompts, responses, 50)
    monkeypatch.setattr("dpo.engine.logprobs._self_check", lambda model: "not supported")
    plain = divergence(*map(load_model, folders), prompts, responses, 50)
    assert abs(packed - plain).max().max() < 1e-4


def test_kl_of_a_policy_to_itself_is_zero(folders):
    prompts, responses = random_responses(5)
    table = divergence(load_model(folders[0]), load_model(folders[0]), prompts, responses, 100)
    assert (table["kl"] == 0).all()
    assert (table["policy_logp"] == table["reference_logp"]).all()


class Tabular(torch.nn.Module):
    """A language model over three tokens whose logits depend only on the previous token."""

    def __init__(self, seed):
        super().__init__()
        self.table = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) * 1.5
        self.device = torch.device("cpu")

    def logits(self, batch):
        before = batch.input_ids[0][batch.logit_positions]
        return iter(self.table[before].split(5))


def test_estimate_is_unbiased_and_has_lower_variance_than_the_plain_estimate():
    policy, reference = Tabular(0), Tabular(1)
    p, q = (m.table.log_softmax(1).double() for m in (policy, reference))
    start = 3
    first = p[start].exp()
    step = (p.exp() * (p - q)).sum(1)
    exact = (step[start] + (first * step[:3]).sum()).item()
    entropies = -(p.exp() * p).sum(1)
    exact_entropy = (entropies[start] + (first * entropies[:3]).sum()).item()

    count = 4000
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(first, count, replacement=True, generator=generator)
    second = torch.multinomial(p.exp()[tokens], 1, generator=generator)[:, 0]
    responses = torch.stack([tokens, second], 1).tolist()
    table = divergence(policy, reference, [[start]] * count, responses, 100)
    plain = table["policy_logp"] - table["reference_logp"]
    for estimate, truth in ((table["kl"], exact), (table["entropy"], exact_entropy), (plain, exact)):
        assert abs(estimate.mean() - truth) < 3 * estimate.std() / math.sqrt(count)
    assert table["kl"].std() < 0.8 * plain.std()


def test_responses_to_one_prompt_share_a_row_within_the_token_budget():
    prompts = [[1, 2, 3], [4], [1, 2, 3], [1, 2, 3]]
    rows, order = module._by_prompt(prompts, [[5, 6], [7], [8, 9], [1, 1]], max_tokens=7)
    assert [(row.prompt, row.completions) for row in rows] == [
        ((1, 2, 3), ((5, 6), (8, 9))),
        ((1, 2, 3), ((1, 1),)),
        ((4,), ((7,),)),
    ]
    assert order.tolist() == [0, 2, 3, 1]


def test_kl_is_never_negative():
    logps = torch.randn(2000, VOCABULARY, generator=torch.Generator().manual_seed(0)).mul(20).log_softmax(1)
    nudged = (logps + 1e-7 * logps).log_softmax(1)
    plain = torch.einsum("nv,nv->n", logps.exp(), logps - nudged)
    assert plain.min() < 0, "this test needs a rounding error below 0"
    assert module._compare(logps, nudged, torch.zeros(2000, dtype=torch.long))[:, 2].min() >= 0
