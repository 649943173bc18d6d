"""Answers under padding, seeds and end tokens."""

import pytest
from transformers import AutoTokenizer

from dpo.config import EvaluateParams
from dpo.evaluation.sampling import answer_table, sample
from dpo.logps import load_model


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


def test_a_table_of_answers_is_what_was_sampled_with_its_text_and_its_end(tiny_model_dir, tokenizer):
    model = load_model(str(tiny_model_dir))
    asked = EvaluateParams(samples=1, max_new_tokens=30, temperature=3.0, judge=None)
    table = answer_table(model, tokenizer, ["film"] * 64, asked, 3)
    assert table["ids"].tolist() == sample(
        model, tokenizer, ["film"] * 64, max_new_tokens=30, temperature=3.0, seed=3
    )
    assert table["answer"].tolist() == tokenizer.batch_decode(table["ids"].tolist(), skip_special_tokens=True)
    assert table["finished"].tolist() == [
        len(ids) < 30 or ids[-1] == tokenizer.eos_token_id for ids in table["ids"]
    ]
    assert 0 < table["finished"].sum() < 64
