"""Stage `fetch_model`: base models whose parts do not fit, and templates that depend on the clock."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo.config import load_params
from dpo.engine.chat import render_prompts
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import policy_key
from dpo.engine.settings import ModelSettings
from tasks import fetch_model
from tasks.common.paths import BASE
from tasks.common.runner import run
from tests.support.models import chat_tokenizer, make_model

PARAMS = load_params()
CLOCK = "<|im_start|>system\nNow: {{ strftime_now('%d %b %Y %H:%M:%S') }}<|im_end|>\n"
OWN = Path("models/own/base")


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Return a function that saves a tokenizer with a model of 320 tokens, and runs the stage."""
    monkeypatch.chdir(tmp_path)

    def save_and_run(tokenizer, *, new_model=True, **settings):
        if new_model:
            make_model("llama", OWN, vocab_size=320)
        tokenizer.save_pretrained(OWN)
        params = replace(PARAMS, model=ModelSettings(base=str(OWN), **settings))
        monkeypatch.setattr(fetch_model, "load_params", lambda: params)
        run(fetch_model.main)

    return save_and_run


def clock_tokenizer():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CLOCK + tokenizer.chat_template
    return tokenizer


def refused(fetch, capsys, tokenizer):
    """Return the only line that the stage prints before it stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        fetch(tokenizer)
    assert stopped.value.code == 2
    assert not BASE.exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


def test_a_template_that_writes_the_time_is_fixed_once_and_in_the_manifest(fetch):
    fetch(clock_tokenizer(), date="2026-11-26")
    tokenizer = load_tokenizer(BASE)
    assert "Now: 26 Nov 2026 00:00:00<|im_end|>" in render_prompts(tokenizer, ["Hello"])[0]
    fixed = policy_key(BASE, tokenizer, PARAMS.engine)
    assert fixed == policy_key(BASE, load_tokenizer(BASE), PARAMS.engine)
    fetch(clock_tokenizer(), date="2026-11-27")
    assert policy_key(BASE, load_tokenizer(BASE), PARAMS.engine)["template"] != fixed["template"]


def test_a_template_that_writes_the_time_needs_a_date(fetch, capsys):
    message = "the chat template writes today's date; set model.date to a day such as 2026-11-26"
    assert refused(fetch, capsys, clock_tokenizer()) == f"error: params.yaml: model.base: {message}"


@pytest.mark.parametrize("tokens", [["rivers"], ["<|note|>", "rivers", "glass"]])
def test_more_tokens_than_embeddings_are_named_in_one_line(fetch, capsys, tokens):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(tokens)
    assert f"has 320 embeddings, its tokenizer {320 + len(tokens)} tokens; resize" in refused(
        fetch, capsys, tokenizer
    )


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([torch.bfloat16], {torch.bfloat16}),
        ([torch.float16], {torch.float16}),
        ([torch.float32], {torch.float32}),
        ([torch.bfloat16, torch.float32], {torch.float32}),
    ],
)
@pytest.mark.parametrize("shard", ["1MB", "20KB"])
def test_the_data_type_and_the_values_of_a_checkpoint_are_kept(fetch, kinds, expected, shard):
    make_model("llama", OWN, vocab_size=320)
    model = AutoModelForCausalLM.from_pretrained(OWN)
    for number, weight in enumerate(model.parameters()):
        weight.data = weight.data.to(kinds[number % len(kinds)])
    for file in OWN.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(OWN, max_shard_size=shard)
    assert (len([*OWN.glob("*.safetensors")]) > 1) == (shard == "20KB")
    fetch(chat_tokenizer(), new_model=False)
    saved = load_file(BASE / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == expected
    assert all(
        torch.equal(saved[name].float(), w.float()) for name, w in model.state_dict().items() if name in saved
    )
    assert len(saved) >= len([*model.parameters()])
