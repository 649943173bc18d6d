"""Sampling against the plain model: padding, equal prompts, batches, seeds, end tokens and all kinds of cache."""

import logging

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpo.engine.logprobs import load_model
from dpo.engine.packing import pack
from dpo.engine.tokenization import TokenRow, prompt_ids
from dpo.evaluation import sampling
from dpo.evaluation.sampling import draw, proportional_first, response_limit, response_table, sample
from tests.support.models import ARCHITECTURES, GROUPED, make_model

CACHES = {
    "llama": {},
    "gpt2": {},
    "bloom": {},
    "mistral": {"sliding_window": 5},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "mamba": {},
    "qwen3_moe": {},
    "mixtral": {},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "head_dim": 8},
}
"""Absolute, relative and rotary positions, a sliding window, convolution states, caches that are not shared."""


@pytest.mark.parametrize("count", [1, 5, 16, 96, 256, 300])
def test_the_first_rows_have_the_same_share_of_each_prompt(count):
    sizes = {"c": 128, "a": 64, "d": 48, "b": 16}
    prompts = pd.Series([name for name, size in sizes.items() for _ in range(size)]).sample(frac=1, random_state=3)
    order = proportional_first(prompts.tolist(), count)
    assert sorted(order) == list(range(256))
    first = prompts.iloc[order[:count]].value_counts()
    assert all(abs(first.get(name, 0) - min(count, 256) * size / 256) < 1 for name, size in sizes.items())
    assert list(order[:count]) == sorted(order[:count])
    assert list(order[count:]) == sorted(order[count:])


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def greedy(model, prompt, end, max_new_tokens):
    """Decode greedily by full forward passes without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens and (len(ids) == len(prompt) or ids[-1] != end):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", CACHES)
def test_sampling_at_temperature_near_zero_equals_greedy_decoding(architecture, tokenizer, tmp_path, monkeypatch):
    for name in ("lfm2", "mamba", "minimax"):
        monkeypatch.setitem(ARCHITECTURES, name, (name, {} if name == "mamba" else GROUPED))
    end = tokenizer.eos_token_id
    changes = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
    folder = make_model(architecture, tmp_path / "model", **changes, **CACHES[architecture])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = ["short", "a much longer prompt about a film that was long", "short", "x", "a bore", "short", "x"]
    settings = {"max_new_tokens": 18, "temperature": 1e-5, "seed": 3, "max_tokens_per_batch": 4 * 50}
    responses = sample(load_model(folder), tokenizer, prompts, **settings)
    assert responses == [greedy(plain, prompt, end, 18) for prompt in prompt_ids(tokenizer, prompts)]


@pytest.mark.parametrize("vocabulary", [100, 256, 700])
def test_a_drawn_token_is_the_first_whose_cumulative_probability_exceeds_the_random_number(vocabulary):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(500, vocabulary, generator=generator)
    random = torch.rand(500, generator=generator, dtype=torch.float64)
    random[:2], random[2:4] = 0, 1 - 2**-53
    logits[0, :5], logits[2, -5:] = -torch.inf, -torch.inf  # tokens without probability are never drawn
    tokens = draw(logits, random, 0.7)
    edges = (logits.double() / 0.7).softmax(1).cumsum(1)
    upper = edges.gather(1, tokens[:, None])[:, 0]
    lower = torch.where(tokens > 0, edges.gather(1, (tokens - 1).clamp_min(0)[:, None])[:, 0], 0)
    assert ((lower - 1e-6 <= random) & (random <= upper + 1e-6)).all()
    assert tokens[:4].tolist() == [5, 0, vocabulary - 6, vocabulary - 1]


def test_responses_to_equal_prompts_are_independent_draws_from_the_policy(tiny_model_dir, tokenizer):
    model = load_model(tiny_model_dir)
    settings = GenerationConfig(repetition_penalty=5.0, top_k=2, min_p=0.5, eos_token_id=[0, 1, 2, 3])
    model.model.generation_config = settings
    draws, temperature = 3000, 0.7
    responses = sample(
        model, tokenizer, ["film"] * draws + ["bore"], max_new_tokens=2, temperature=temperature, seed=5
    )
    assert model.model.generation_config is settings

    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    prompt = prompt_ids(tokenizer, ["film"])[0]
    vocabulary = range(len(tokenizer))
    with torch.no_grad():
        first = (plain(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(0)
        logits = plain(torch.tensor([[*prompt, token] for token in vocabulary])).logits[:, -1]
    second = (logits.double() / temperature).softmax(1)
    second[tokenizer.eos_token_id] = 0
    for step, exact in enumerate((first, first @ second)):
        drawn = [response[step] for response in responses[:draws] if len(response) > step]
        counts, expected = torch.bincount(torch.tensor(drawn), minlength=len(vocabulary)), draws * exact
        frequent = expected > 5
        chi_square = ((counts - expected) ** 2 / expected)[frequent].sum() + (
            (counts - expected)[~frequent].sum() ** 2 / expected[~frequent].sum()
        )
        degrees = frequent.sum()
        assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


def test_equal_prompts_share_one_pass_and_finished_responses_leave_the_batch(tiny_model_dir, tokenizer):
    model = load_model(tiny_model_dir)
    prompts = ["a long film"] * 60 + ["a long bore"] * 4
    long, bore = prompt_ids(tokenizer, ["a long film", "a long bore"])
    shared = next(place for place, (one, other) in enumerate(zip(long, bore, strict=False)) if one != other)
    read = []
    model.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    responses = sample(model, tokenizer, prompts, max_new_tokens=32, temperature=3.0, seed=3)
    assert read[0] == len(long) + len(bore) - shared
    assert sum(read[1:]) == sum(len(response) - 1 for response in responses) < 64 * 31


def test_a_response_does_not_depend_on_batches_other_prompts_and_processes(tiny_model_dir, tokenizer):
    model = load_model(tiny_model_dir)
    settings = {"max_new_tokens": 12, "temperature": 1.5, "seed": 3}
    prompts = ["film", "a much longer prompt about a film that was long", "x", "film", "a bore", "x"]
    together = sample(model, tokenizer, prompts, **settings)
    assert len(set(map(tuple, together))) == 6
    assert sample(model, tokenizer, prompts, **settings, max_tokens_per_batch=1) == together
    parts = [sample(model, tokenizer, prompts[i::2], **settings, numbers=range(i, 6, 2)) for i in (0, 1)]
    assert [parts[i % 2][i // 2] for i in range(6)] == together


@pytest.mark.parametrize("rows_that_fit", [3, 0])
def test_batches_are_halved_when_memory_runs_out(rows_that_fit, tiny_model_dir, tokenizer, monkeypatch, caplog):
    model = load_model(tiny_model_dir)
    settings = {"max_new_tokens": 12, "temperature": 1.5, "seed": 3}
    prompts = ["film", "a bore", "x", "a long film"] * 4
    expected = sample(model, tokenizer, prompts, **settings)
    start = type(model).start_responses

    def out_of_memory(self, prompts, new_tokens):
        if len(prompts) > rows_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return start(self, prompts, new_tokens)

    monkeypatch.setattr(type(model), "start_responses", out_of_memory)
    if not rows_that_fit:
        with pytest.raises(torch.OutOfMemoryError):
            sample(model, tokenizer, prompts, **settings)
        return
    with caplog.at_level(logging.WARNING):
        assert sample(model, tokenizer, prompts, **settings) == expected
    sizes = [record.args[0] for record in caplog.records if "out of memory" in record.msg]
    assert sizes == [16, 8, 4]


def test_same_seed_gives_the_same_responses_and_no_token_follows_the_end_token(tiny_model_dir, tokenizer):
    model = load_model(tiny_model_dir)
    settings = {"max_new_tokens": 30, "temperature": 3.0}
    prompts = ["film"] * 64
    first = sample(model, tokenizer, prompts, **settings, seed=3)
    assert first == sample(model, tokenizer, prompts, **settings, seed=3)
    assert first != sample(model, tokenizer, prompts, **settings, seed=4)
    end = tokenizer.eos_token_id
    assert any(len(response) < 30 for response in first)
    assert all(end not in response[:-1] for response in first)
    assert all(len(response) == 30 or response[-1] == end for response in first)


def test_prompts_of_one_token_and_a_tokenizer_without_end_token(tiny_model_dir, tokenizer, monkeypatch):
    model = load_model(tiny_model_dir)
    tokenizer.eos_token = None
    monkeypatch.setattr(sampling, "prompt_ids", lambda tokenizer, prompts, max_tokens: [[5]] * len(prompts))
    responses = sample(model, tokenizer, ["film"] * 3, max_new_tokens=5, temperature=1.0, seed=3)
    assert [len(response) for response in responses] == [5, 5, 5]


def test_response_table_has_ids_text_and_end_and_truncates_long_prompts(tiny_model_dir, tokenizer, monkeypatch):
    model = load_model(tiny_model_dir)
    table = response_table(model, tokenizer, ["film"] * 64, max_new_tokens=30, max_prompt_tokens=70, seed=3)
    assert table["ids"].tolist() == sample(
        model, tokenizer, ["film"] * 64, max_new_tokens=30, temperature=1.0, seed=3
    )
    assert table["response"].tolist() == tokenizer.batch_decode(table["ids"].tolist(), skip_special_tokens=True)
    assert table["finished"].tolist() == [
        len(ids) < 30 or ids[-1] == tokenizer.eos_token_id for ids in table["ids"]
    ]
    assert 0 < table["finished"].sum() < 64
    long = response_table(model, tokenizer, ["film " * 500], max_new_tokens=30, max_prompt_tokens=70, seed=3)
    (ids,) = prompt_ids(tokenizer, ["film " * 500])
    assert len(ids) > 70
    (short,) = prompt_ids(tokenizer, ["film " * 500], 70)
    monkeypatch.setattr(sampling, "prompt_ids", lambda *_: [short])
    assert response_table(model, tokenizer, ["film"], max_new_tokens=30, max_prompt_tokens=70, seed=3).equals(long)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_the_sampled_distribution_is_the_scored_one(architecture, precision, tolerance, tmp_path):
    folder = make_model(architecture, tmp_path / "model", **CACHES[architecture])
    model = load_model(folder, precision)
    assert model.in_stream
    prompts, response = [[5, 6, 7, 8, 9], [5, 6, 3], [5]], [[11, 12, 13], [21, 22, 23], [31, 32, 33]]
    rows = [TokenRow(str(i), tuple(prompt), (tuple(response[i]),)) for i, prompt in enumerate(prompts)]
    with torch.no_grad():
        scored = model(pack(rows), per_token=True).view(3, 3)
        logits, cache = model.start_responses(prompts, 3)
        sampled = []
        for step in range(3):
            tokens = torch.tensor([row[step] for row in response])
            sampled.append(logits.log_softmax(1).gather(1, tokens[:, None])[:, 0])
            logits = model.continue_responses(tokens, cache)
    torch.testing.assert_close(torch.stack(sampled, 1), scored, rtol=0, atol=tolerance)


def test_the_automatic_limit_is_the_95_percent_quantile_of_the_held_out_completions(tokenizer):
    words = [1] * 30 + [20] * 8 + [90] * 2  # of 40 completions
    texts = [" ".join(["film"] * count) for count in words]
    table = pd.DataFrame(
        {"id": map(str, range(20)), "prompt": "film", "chosen": texts[:20], "rejected": texts[20:]}
    )
    lengths = sorted(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts)
    assert response_limit(7, table, tokenizer, 512) == 7
    assert lengths[37] <= response_limit("auto", table, tokenizer, 512) < lengths[39]
    assert response_limit("auto", table, tokenizer, lengths[-1] + 1) <= (lengths[-1] + 1) * 3 // 4
    assert response_limit("auto", table.head(1), tokenizer, 512) == lengths[0]
