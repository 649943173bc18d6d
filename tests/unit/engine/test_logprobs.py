"""The log-prob engine compared with plain transformers models, one forward pass per completion."""

import contextlib
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dpo.common.errors import InputError
from dpo.engine import attention, head
from dpo.engine.head import FusedEmbedding
from dpo.engine.logprobs import LogProbModel, load_model, sequence_logps
from dpo.engine.packing import pack
from dpo.engine.tokenization import TokenRow
from tests.support.logprobs import (
    ARCHITECTURES,
    assert_same_gradients,
    gradients,
    make_rows,
    naive_logps,
    plain_model,
    tokens,
)
from tests.support.models import TINY, make_model

# Sums of up to 30 token log-probs, about 100 nats. One unit in the last place of fp32 is 8e-6.
CLOSE = {"rtol": 1e-6, "atol": 1e-5}


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama(llama_dir):
    return load_model(llama_dir)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_and_gradients_equal_a_naive_loop(architecture, tmp_path):
    folder, rows = make_model(architecture, tmp_path), make_rows()
    plain, model = plain_model(folder), load_model(folder)
    expected = naive_logps(plain, rows)
    packed = model(pack(rows)).view(len(rows), 2)
    torch.testing.assert_close(packed, expected, **CLOSE)
    assert_same_gradients(gradients(model.model, packed), gradients(plain, expected))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_accumulated_in_place_equal_a_naive_loop(architecture, tmp_path):
    folder, rows = make_model(architecture, tmp_path), make_rows()
    rows += [TokenRow("padded", (0, *tokens(3, 11), 0), ((0, 5), (5, 0)))]  # the pad token gets no gradient
    plain, model = plain_model(folder), load_model(folder)
    expected = gradients(plain, naive_logps(plain, rows))
    model.accumulate_in_place = True
    weights = torch.arange(1, 2 * len(rows) + 1).view(-1, 2)
    for micro_batch, share in ((rows[:2], weights[:2]), (rows[2:], weights[2:])):
        (model(pack(micro_batch)) * share.flatten()).sum().backward()
    ours = {name: weight.grad for name, weight in model.model.named_parameters()}
    assert_same_gradients(ours, expected)
    table = model.model.get_input_embeddings()
    if table.padding_idx == 0 and table.weight is not model.model.get_output_embeddings().weight:
        assert not table.weight.grad[0].any()


def test_gradients_of_an_untied_head_with_bias(tmp_path):
    folder, rows = make_model("phi", tmp_path, seed=1), make_rows()
    plain, model = plain_model(folder), load_model(folder)
    assert model.model.lm_head.bias is not None
    nn.init.normal_(model.model.lm_head.bias)
    plain.lm_head.bias.data = model.model.lm_head.bias.data.clone()
    ours, expected = model(pack(rows)), naive_logps(plain, rows)
    torch.testing.assert_close(ours.view(-1, 2), expected, **CLOSE)
    assert_same_gradients(gradients(model.model, ours), gradients(plain, expected))


def test_logps_include_every_completion_token_and_no_prompt_token(llama, llama_dir):
    end = TINY["eos_token_id"]
    prompt, text = tokens(6, 1), tokens(5, 2)
    with_end, without_end = sequence_logps(llama, [TokenRow("a", prompt, ((*text, end), text))], 100)[0]
    table = plain_model(llama_dir)(input_ids=torch.tensor([prompt + text])).logits[0].log_softmax(1)
    by_token = [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(text)]
    assert without_end.item() == pytest.approx(sum(by_token), rel=1e-6)
    assert (with_end - without_end).item() == pytest.approx(table[-1, end].item(), abs=2e-5)


@pytest.mark.parametrize("max_tokens_per_microbatch", [1, 30, 60, 10_000])
def test_results_do_not_depend_on_the_token_budget(llama, llama_dir, max_tokens_per_microbatch):
    rows = make_rows()
    expected = naive_logps(plain_model(llama_dir), rows)
    torch.testing.assert_close(sequence_logps(llama, rows, max_tokens_per_microbatch), expected, **CLOSE)


def test_results_do_not_depend_on_the_order_of_rows(llama):
    rows = make_rows()
    order = [2, 0, 3, 1]
    shuffled = sequence_logps(llama, [rows[i] for i in order], 10_000)
    torch.testing.assert_close(shuffled, sequence_logps(llama, rows, 10_000)[order], **CLOSE)


def test_results_do_not_depend_on_other_rows_or_the_other_completion(llama):
    rows = make_rows()
    before = llama(pack(rows)).view(-1, 2)
    other = TokenRow("usual", rows[0].prompt, (tokens(7, 50), rows[0].completions[1]))
    after = llama(pack([other, TokenRow("short", tokens(1, 51), rows[1].completions), *rows[2:]])).view(-1, 2)
    torch.testing.assert_close(after[0, 1], before[0, 1], **CLOSE)
    torch.testing.assert_close(after[2:], before[2:], **CLOSE)
    assert (after[0, 0] - before[0, 0]).abs() > 1
    assert ((after[1] - before[1]).abs() > 0.01).all()


def test_no_gradient_reaches_other_rows_or_the_other_completion(llama):
    rows = make_rows()
    embeddings = []
    llama.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), embeddings.append(output))[1]
    )
    llama(pack(rows))[1].backward()
    prompt, (chosen, rejected) = rows[0].prompt, rows[0].completions
    seen = embeddings[0].grad[0].abs().sum(1) > 0
    # The prompt and rejected without its last token, which predicts nothing.
    expected = [True] * len(prompt) + [False] * len(chosen) + [True] * (len(rejected) - 1)
    assert seen.tolist() == expected + [False] * (sum(row.tokens for row in rows) - len(expected))


def test_rows_with_one_and_with_three_completions(llama, llama_dir):
    plain = plain_model(llama_dir)
    for count in (1, 3):
        rows = [TokenRow("a", tokens(4, 1), tuple(tokens(3 + i, 60 + i) for i in range(count)))] * 2
        torch.testing.assert_close(sequence_logps(llama, rows, 50), naive_logps(plain, rows), **CLOSE)


def test_a_prompt_of_8000_tokens(tmp_path):
    folder = make_model("llama", tmp_path, max_position_embeddings=8192)
    rows = [TokenRow("long", tokens(8000, 1), (tokens(5, 2), tokens(8, 3)))]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        expected = naive_logps(plain, rows)
    torch.testing.assert_close(sequence_logps(load_model(folder), rows, 1024), expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_disabled_in_training_mode(tmp_path):
    folder, rows = make_model("gpt2", tmp_path), make_rows()
    model = load_model(folder).train()
    assert model.model.config.resid_pdrop == model.model.config.attn_pdrop == model.model.config.embd_pdrop == 0.1
    torch.testing.assert_close(model(pack(rows)).view(-1, 2), naive_logps(plain_model(folder), rows), **CLOSE)


@pytest.fixture
def projected(monkeypatch):
    """Record the number of positions of each projection to the vocabulary, at most five."""
    monkeypatch.setattr(head, "HEAD_CHUNK", 5)
    lengths, linear = [], head.linear

    def recorded(hidden, weight, bias=None):
        if weight.shape[0] == TINY["vocab_size"]:
            lengths.append(len(hidden))
        return linear(hidden, weight, bias)

    monkeypatch.setattr(head, "linear", recorded)
    return lengths


def test_the_vocabulary_projection_is_chunked_without_changing_results(llama, llama_dir, projected):
    rows, plain = make_rows(), plain_model(llama_dir)
    expected = naive_logps(plain, rows)
    projected.clear()
    packed = llama(pack(rows))
    torch.testing.assert_close(packed.view(-1, 2), expected, **CLOSE)
    assert_same_gradients(gradients(llama.model, packed), gradients(plain, expected))
    scored = sum(row.completion_tokens for row in rows)
    assert max(projected) == 5
    last = scored % 5 or 5
    assert sum(projected) == 2 * scored - last, "the backward pass recomputes all chunks except the last"


def test_a_frozen_head_is_projected_once_and_keeps_no_logits(llama, llama_dir, projected):
    rows, plain = make_rows(), plain_model(llama_dir)
    for model in (llama.model, plain):
        model.get_output_embeddings().weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        packed = llama(pack(rows))
    assert not [shape for shape in kept if TINY["vocab_size"] in shape]
    ours = gradients(llama.model, packed)
    assert sum(projected) == sum(row.completion_tokens for row in rows)
    assert_same_gradients(ours, gradients(plain, naive_logps(plain, rows)))


def test_a_second_backward_pass_gives_the_same_gradient(llama):
    total = llama(pack(make_rows())).sum()
    first = torch.autograd.grad(total, list(llama.parameters()), retain_graph=True)
    for first_grad, second_grad in zip(first, torch.autograd.grad(total, list(llama.parameters())), strict=True):
        torch.testing.assert_close(second_grad, first_grad, rtol=1e-6, atol=1e-7)


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_kept(tmp_path, monkeypatch):
    folder = make_model("llama", tmp_path, vocab_size=5_000)
    model = load_model(folder)
    monkeypatch.setattr(head, "HEAD_CHUNK", 16)
    rows = [TokenRow(str(i), tokens(3, i), (tokens(40, i + 50), tokens(50, i + 90))) for i in range(4)]
    weights = model.model.get_output_embeddings().weight.numel()
    largest = []
    pack_hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (largest.append(t.numel()), t)[1], lambda t: t)
    with pack_hooks:
        model(pack(rows)).sum().backward()
    assert max(largest) == weights < sum(row.completion_tokens for row in rows) * 5_000


def test_the_transformers_model_is_unchanged(llama, llama_dir, tmp_path):
    ids = torch.tensor([tokens(10, 1)])
    llama.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        torch.testing.assert_close(llama.model(input_ids=ids).logits, plain_model(llama_dir)(input_ids=ids).logits)
    llama.model.save_pretrained(tmp_path)
    again = plain_model(tmp_path)
    for name, weight in plain_model(llama_dir).state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_sliding_window_attention(tmp_path):
    # Rows have up to 31 tokens, so most positions attend to fewer tokens than precede them.
    folder = make_model("mistral", tmp_path, sliding_window=6)
    rows = make_rows()
    model, plain = load_model(folder), plain_model(folder)
    assert model.in_stream
    ours, naive = sequence_logps(model, rows, 1000), naive_logps(plain, rows).detach()
    torch.testing.assert_close(ours, naive, **CLOSE)
    wide = load_model(make_model("mistral", tmp_path / "wide", sliding_window=None))
    assert (sequence_logps(wide, rows, 1000) - naive).abs().max() > 0.1


def reference_varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, window_size):
    """Compute variable-length attention in fp32 from its definition."""
    left, right = window_size
    assert right == 0, "causal"
    outputs = []
    for first, last, first_key, last_key in zip(
        cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False
    ):
        for position in range(first, last):
            seen = slice(max(first_key, last_key - (last - position) - left) if left >= 0 else first_key,
                         last_key - (last - position) + 1)  # fmt: skip
            heads = []
            for number, vector in enumerate(query[position].float()):
                of = number * key.shape[1] // query.shape[1]
                scores = key[seen, of].float() @ vector * scale
                heads.append(scores.softmax(0) @ value[seen, of].float())
            outputs.append(torch.stack(heads))
    assert (max_q, max_k) == (max(cu_seqlens_q.diff()), max(cu_seqlens_k.diff()))
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, 6])
def test_variable_length_attention_equals_attention_by_rows(monkeypatch, window):
    monkeypatch.setattr(attention, "variable_length_attention", reference_varlen_attention)
    rows = [*make_rows(), TokenRow("three", tokens(4, 11), (tokens(2, 12), tokens(5, 13), tokens(1, 14)))]
    layout = pack([*rows, TokenRow("one", tokens(6, 15), (tokens(3, 16),))]).layout
    length = sum(prompt + sum(completions) for prompt, completions in layout)
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, length, 8, generator=draw).bfloat16().float()
    key, value = torch.randn(2, 1, 2, length, 8, generator=draw).bfloat16().float()

    def attend(layout):
        return attention.packed_attention(
            None, query, key, value, None, layout=layout, scaling=0.3, sliding_window=window
        )[0]

    by_rows, varlen = attend(layout), attend(attention.varlen_metadata(layout, torch.device("cpu")))
    torch.testing.assert_close(varlen, by_rows, rtol=1e-5, atol=1e-5)


def test_a_model_that_fails_the_self_check_is_computed_row_by_row_with_a_warning(tmp_path, caplog):
    # Gemma 2 caps attention scores and logits; the packed stream does not.
    folder = make_model("gemma2", tmp_path, initializer_range=0.5)
    model, plain = load_model(folder), plain_model(folder)
    assert not model.in_stream
    assert "Gemma2ForCausalLM: its packed log-probs differ from plain ones by" in caplog.text
    rows = make_rows()
    ours, naive = model(pack(rows)), naive_logps(plain, rows)
    torch.testing.assert_close(ours.view(-1, 2), naive, **CLOSE)
    assert_same_gradients(gradients(model.model, ours), gradients(plain, naive))


def test_a_model_that_cannot_run_the_stream_is_computed_row_by_row_with_a_warning(tmp_path, caplog):
    # Bloom adds a position bias to the attention scores and does not support custom attention.
    folder = make_model("bloom", tmp_path)
    model = load_model(folder)
    assert not model.in_stream
    assert "BloomForCausalLM: " in caplog.text
    rows = make_rows()
    naive = naive_logps(plain_model(folder), rows).detach()
    torch.testing.assert_close(sequence_logps(model, rows, 1000), naive, **CLOSE)


def test_models_with_dynamic_rope_are_computed_row_by_row(tmp_path, caplog):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    folder = make_model("llama", tmp_path, max_position_embeddings=16, rope_parameters=rope)
    model, rows = load_model(folder), make_rows()
    assert not model.in_stream
    naive = naive_logps(plain_model(folder), rows).detach()
    torch.testing.assert_close(sequence_logps(model, rows, 1000), naive, **CLOSE)


def test_dropout_outside_dropout_modules_is_disabled(tmp_path):
    model = load_model(make_model("opt", tmp_path, dropout=0.5, attention_dropout=0.5, layerdrop=0.5))
    packed = pack(make_rows())
    torch.testing.assert_close(model.train()(packed), model.eval()(packed), **CLOSE)


def test_compile_without_a_gpu_is_an_error(llama_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"engine\.compile: true needs a CUDA GPU and precision: bf16"):
        load_model(llama_dir, "bf16", compiled=True)


def test_bf16_keeps_weights_and_sums_in_fp32(llama_dir):
    rows = make_rows()
    exact = sequence_logps(load_model(llama_dir), rows, 1000)
    model = load_model(llama_dir, "bf16")
    ours = sequence_logps(model, rows, 1000)
    assert ours.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    error = (ours - exact).abs().max().item()
    assert 1e-4 < error < 0.05 * exact.abs().max().item()


class LiveBf16(TorchDispatchMode):
    """Count the bytes of live bf16 storages that were created in this mode."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16:
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = weakref.ref(storage)
        return result

    def bytes(self):
        return sum(s.nbytes() for s in (ref() for ref in self.storages.values()) if s is not None)


@pytest.mark.parametrize("grad", [True, False])
def test_bf16_keeps_no_copies_of_weights(tmp_path, grad):
    model = load_model(make_model("llama", tmp_path / "m", hidden_size=64, intermediate_size=160), "bf16").train()
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    held = []
    norm = model.model.base_model.norm  # runs after the last layer
    norm.register_forward_pre_hook(lambda *_: held.append(live.bytes()))
    live = LiveBf16()
    with live, contextlib.nullcontext() if grad else torch.no_grad():
        model(pack(make_rows()))
    layers = 2 * sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    assert live.storages
    assert held[0] < layers / 10, "the rounded weights of a layer are freed before the next layer"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_with_and_without_a_weight_cache_is_bit_equal(tmp_path, monkeypatch, checkpointing):
    folder, results = make_model("llama", tmp_path / "m"), []
    cached = lambda self: torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")  # noqa: E731
    for autocast in (LogProbModel._autocast, cached):
        monkeypatch.setattr(LogProbModel, "_autocast", autocast)
        model = load_model(folder, "bf16").train()
        if checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        scores = model(pack(make_rows()))
        scores.sum().backward()
        results.append([scores.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_the_fused_embedding_gradient_is_deterministic_with_two_threads():
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    ids = torch.randint(0, 200, (1, 1000), generator=generator)
    grad = torch.randn(1, 1000, 576, generator=generator)
    torch.set_num_threads(2)
    try:
        results = []
        for _ in range(10):
            weight = torch.zeros(1000, 576, requires_grad=True)
            FusedEmbedding.apply(ids, weight, None).backward(grad)
            results.append(weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)
    expected = torch.zeros(1000, 576, dtype=torch.float64).index_add_(0, ids[0], grad[0].double())
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=1e-4)
