"""The count of tokens and FLOPs: by hand, and against the FLOP counter of torch."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from dpo.engine.flops import Cost, cost_of
from dpo.engine.tokenization import TokenRow

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": True,
}  # fmt: skip
CONFIG = LlamaConfig(**SIZES)
ROW = TokenRow("a", (1, 2, 3), ((4, 5), (6,)))
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
SEEN = 6 + 3 + 1 + 3 * 3  # prompt, both completions, completions to the prompt
FORWARD = 2 * 2 * LAYER * 6, 2 * 50 * 8 * 3, 4 * 2 * 8 * SEEN


def test_each_kind_of_work_by_hand():
    layers, head, attention = FORWARD
    forward = layers + head + attention
    assert cost_of([ROW], CONFIG, "sampled") == Cost(sampled_tokens=3, flops=forward)
    assert cost_of([ROW], CONFIG, "scored") == Cost(scored_tokens=6, flops=forward)
    assert cost_of([ROW], CONFIG, "trained") == Cost(trained_tokens=6, flops=3 * forward)
    lora = cost_of([ROW, ROW], CONFIG, "trained", lora=True, extra_passes=1)
    assert lora == Cost(trained_tokens=12, flops=2 * (2 * (layers + head) + 3 * attention + forward))


def test_a_forward_pass_has_the_flops_that_torch_counts():
    """Torch counts all (query, key) positions, also those that causality masks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(7)[None], use_cache=False)
    row = TokenRow("a", (1,), (tuple(range(2, 8)),))
    own = cost_of([row], CONFIG, "scored").flops
    masked, projected_prompt, rotary = 4 * 2 * 8 * (7 * 6 // 2), 2 * 50 * 8, 2 * 2 * 7
    assert counter.get_total_flops() == pytest.approx(own + masked + projected_prompt, abs=rotary)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_mixture_has_the_flops_of_the_active_experts(kind):
    torch.manual_seed(0)
    sizes = {"num_experts": 4} if kind == "qwen3_moe" else {"num_local_experts": 4}
    config = AutoConfig.for_model(kind, **SIZES, **sizes, num_experts_per_tok=2, moe_intermediate_size=12)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(7)[None], use_cache=False)
    own = cost_of([TokenRow("a", (1,), (tuple(range(2, 8)),))], config, "scored").flops
    masked, projected_prompt, rotary = 4 * 2 * 8 * (7 * 6 // 2), 2 * 50 * 8, 2 * 2 * 7
    assert counter.get_total_flops() == pytest.approx(own + masked + projected_prompt, abs=rotary)


def test_costs_are_added_and_an_unknown_architecture_has_no_flops():
    unknown = cost_of([ROW], AutoConfig.for_model("gpt2"), "sampled")
    assert unknown == Cost(sampled_tokens=3, flops=None)
    assert Cost(scored_tokens=1, flops=2.0) + Cost(1, 2, 3, 4.0) == Cost(1, 3, 3, 6.0)
    assert (Cost(flops=2.0) + unknown).flops is None
