"""Reward models that score responses: batches, truncation, and models that are refused."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from dpo.common.errors import InputError
from dpo.evaluation.judges.reward_model import BATCH_SIZE, reward_scores
from dpo.evaluation.settings import RewardModelSettings
from tests.support.judges import TURNS, load_judge
from tests.support.models import CHAT_TEMPLATE, SENTENCES, TINY, byte_level_bpe, chat_tokenizer

PROMPTS = ["Say something about film 12.", TURNS, "film", "A long film, neither good nor bad. " * 2, TURNS, "film"]
RESPONSES = ["Film 3 is a joy and a delight.", "A bore.", "", "日本語 and 🎬", "", "Alas, " * 12]


def save_classifier(kind, tokenizer, **changes):
    """Save a random classifier of two layers and its tokenizer under models/own/, and return the settings."""
    extra = {"num_labels": 1, "max_position_embeddings": 200, "vocab_size": len(tokenizer), **changes}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **{**TINY, **extra}))
    model.save_pretrained("models/own/rm")
    tokenizer.save_pretrained("models/own/rm")
    return RewardModelSettings(kind="reward_model", model="models/own/rm", revision=None)


def bert_tokenizer():
    """Return a tokenizer with pairs as in BERT, [CLS] first [SEP] second [SEP], and token types."""
    tokenizer = byte_level_bpe(["[PAD]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/own").mkdir(parents=True)


@torch.no_grad()
def plain_scores(rows):
    """Return the saved model's output for each row, by one forward pass per row."""
    model = AutoModelForSequenceClassification.from_pretrained("models/own/rm", dtype=torch.float32).eval()
    return [model(**{k: torch.tensor([ids]) for k, ids in row.items()}).logits.item() for row in rows]


def chat_rows(tokenizer, prompts, responses):
    for prompt, response in zip(prompts, responses, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], tokenize=False)
        yield {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_reward_model_with_chat_template_scores_the_conversation_with_the_response(models, kind):
    tokenizer = chat_tokenizer()
    params = save_classifier(kind, tokenizer, pad_token_id=tokenizer.pad_token_id)
    judge = load_judge(params)
    expected = plain_scores(chat_rows(tokenizer, PROMPTS, RESPONSES))
    assert len({round(score, 4) for score in expected}) == len(expected)
    assert judge.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)


def test_reward_model_without_chat_template_scores_prompt_and_response_as_a_pair(models):
    tokenizer = bert_tokenizer()
    params = save_classifier("bert", tokenizer)
    texts = [
        prompt
        if isinstance(prompt, str)
        else "user: Say something about film 12.\n\nassistant: Film 12 is a bore.\n\nuser: And film 3?"
        for prompt in PROMPTS
    ]
    rows = [tokenizer(text, response) for text, response in zip(texts, RESPONSES, strict=True)]
    assert {1} < {*rows[0]["token_type_ids"], 0, 1}
    expected = plain_scores(rows)
    assert len({round(score, 4) for score in expected}) == len(expected)
    assert load_judge(params).score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)


def test_scores_do_not_depend_on_the_batch_and_keep_the_order(models):
    tokenizer = chat_tokenizer()
    judge = load_judge(save_classifier("llama", tokenizer, pad_token_id=tokenizer.pad_token_id))
    generator = random.Random(0)
    responses = [" ".join(generator.choices(SENTENCES, k=generator.randrange(4))) for _ in range(40)]
    prompts = generator.choices(PROMPTS, k=40)
    together = judge.score(prompts, responses)
    alone = [judge.score([prompt], [response])[0] for prompt, response in zip(prompts, responses, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert judge.score(prompts[::-1], responses[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    assert judge.score([], []) == []


def test_responses_of_similar_length_share_a_batch(models):
    tokenizer = chat_tokenizer()
    save_classifier("llama", tokenizer, pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForSequenceClassification.from_pretrained("models/own/rm").eval()
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    reward_scores(model, tokenizer, ["film"] * 2 * BATCH_SIZE, ["A joy.", "A joy. " * 9] * BATCH_SIZE)
    (rows, width), (other_rows, other_width) = shapes
    assert rows == other_rows == BATCH_SIZE
    assert width - other_width > 20


@pytest.mark.parametrize("pad", [None, "<|im_start|>"])
def test_last_token_is_scored_if_it_is_the_end_token(models, pad):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    if pad is None:
        tokenizer.pad_token = None
    params = save_classifier("llama", tokenizer, pad_token_id=pad and tokenizer.convert_tokens_to_ids(pad))
    rows = list(chat_rows(tokenizer, PROMPTS, RESPONSES))
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in rows)
    assert load_judge(params).score(PROMPTS, RESPONSES) == pytest.approx(plain_scores(rows), abs=1e-5)


def test_long_conversation_is_truncated_at_the_left(models):
    tokenizer = chat_tokenizer()
    params = save_classifier("llama", tokenizer, pad_token_id=tokenizer.pad_token_id)
    prompts, responses = ["film " * 300 + "12?", TURNS * 9 + TURNS[:1]], ["A joy.", "A bore. " * 10]
    rows = list(chat_rows(tokenizer, prompts, responses))
    assert min(len(row["input_ids"]) for row in rows) > 200
    expected = plain_scores({"input_ids": row["input_ids"][-200:]} for row in rows)
    assert load_judge(params).score(prompts, responses) == pytest.approx(expected, abs=1e-5)


def test_long_prompt_of_a_pair_is_truncated_at_the_left(models):
    tokenizer = bert_tokenizer()
    params = save_classifier("bert", tokenizer)
    prompt, response = "film " * 300 + "12?", "A joy."
    asked, given = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
    room = 200 - 3 - len(given)
    row = {
        "input_ids": [1, *asked[-room:], 2, *given, 2],
        "token_type_ids": [0] * (room + 2) + [1] * (len(given) + 1),
    }
    assert load_judge(params).score([prompt], [response]) == pytest.approx(plain_scores([row]), abs=1e-5)


@pytest.mark.parametrize("make", [chat_tokenizer, bert_tokenizer])
def test_response_that_leaves_no_room_for_the_prompt_is_an_error(models, make):
    tokenizer = make()
    judge = load_judge(save_classifier("bert", tokenizer))
    with pytest.raises(
        InputError, match=r"response 2: it has \d+ tokens .* at most 200.*evaluate\.max_new_tokens"
    ):
        judge.score(["film"] * 2, ["short", "日" * 200])


def test_conversation_that_the_template_rejects_is_an_error(models):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    judge = load_judge(save_classifier("llama", tokenizer))
    with pytest.raises(InputError, match=r"evaluate\.judges\.0\.model: response 1: no system role"):
        judge.score([[{"role": "system", "content": "Be brief."}, *TURNS]], ["A joy."])


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        (
            "someone/rewards",
            None,
            [
                "params.yaml: evaluate.judges.0.model: 'someone/rewards' is not an existing folder",
                "it must be a hub id, without a revision",
                "set evaluate.judges.0.revision to a commit",
            ],
        ),
        (
            "models/own/absent",
            None,
            [
                "params.yaml: evaluate.judges.0.model: 'models/own/absent' is not an existing folder",
                "set evaluate.judges.0.revision to a commit",
            ],
        ),
        (
            "elsewhere",
            None,
            [
                "params.yaml: evaluate.judges.0.model: elsewhere is outside models/own/",
                "copy the model to models/own/elsewhere and set evaluate.judges.0.model to that path",
            ],
        ),
        (
            "models/own/empty",
            "main",
            [
                "params.yaml: evaluate.judges.0.revision has no effect",
                "evaluate.judges.0.model is not a hub id",
                "set it to null",
            ],
        ),
    ],
)
def test_reward_model_outside_models_own_or_without_revision_is_an_error_at_load_time(
    models, model, revision, words
):
    for folder in ("elsewhere", "models/own/empty"):
        Path(folder).mkdir()
    with pytest.raises(InputError) as error:
        load_judge(RewardModelSettings(kind="reward_model", model=model, revision=revision))
    assert all(word in str(error.value) for word in words), error.value


def test_reward_model_is_loaded_at_first_use(models):
    Path("models/own/rm").mkdir()
    judge = load_judge(RewardModelSettings(kind="reward_model", model="models/own/rm", revision=None))
    with pytest.raises(InputError, match=r"evaluate\.judges\.0\.model: cannot load 'models/own/rm'"):
        judge.score(["film"], ["A joy."])
    save_classifier("llama", chat_tokenizer())
    assert len(judge.score(["film"], ["A joy."])) == 1


def test_classifier_with_two_outputs_is_an_error(models):
    judge = load_judge(save_classifier("llama", chat_tokenizer(), num_labels=2))
    with pytest.raises(InputError, match="it has 2 outputs; use a model with one"):
        judge.score(["film"], ["A joy."])


def test_model_without_weights_of_the_score_head_is_an_error(models):
    params = save_classifier("llama", chat_tokenizer())
    config = AutoConfig.from_pretrained("models/own/rm")
    AutoModelForCausalLM.from_config(config).save_pretrained("models/own/rm")
    with pytest.raises(InputError, match=r"no weights for score\.weight"):
        load_judge(params).score(["film"], ["A joy."])


def test_pickled_weights_are_not_loaded(models):
    params = save_classifier("llama", chat_tokenizer())
    weights = Path("models/own/rm/model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained("models/own/rm")
    torch.save(model.state_dict(), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(InputError, match=r"cannot load 'models/own/rm'.*safetensors"):
        load_judge(params).score(["film"], ["A joy."])


def test_code_in_a_model_folder_is_not_executed(models):
    params = save_classifier("llama", chat_tokenizer())
    path = Path("models/own/rm/config.json")
    config = {**json.loads(path.read_text()), "model_type": "own"}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}
    path.write_text(json.dumps(config))
    Path("models/own/rm/code.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    with pytest.raises(InputError, match="cannot load 'models/own/rm'"):
        load_judge(params).score(["film"], ["A joy."])
    assert not Path("ran").exists()


def test_non_finite_score_of_a_reward_model_is_an_error(models):
    params = save_classifier("llama", chat_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained("models/own/rm")
    torch.nn.init.constant_(model.score.weight, math.nan)
    model.save_pretrained("models/own/rm")
    with pytest.raises(
        InputError, match=r"evaluate\.judges\.0\.model: 'rm' returned nan for response 1, 'A joy\.'"
    ):
        load_judge(params).score(["film"], ["A joy."])
