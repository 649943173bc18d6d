"""Stage `fetch_model`: base models whose parts do not fit, and templates that depend on the clock."""

from dataclasses import replace
from pathlib import Path

import pytest

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

    def save_and_run(tokenizer, **settings):
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
