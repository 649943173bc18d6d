"""Text to tokens: the seam between prompt and completion, start and end tokenization, truncation."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.common.errors import InputError
from dpo.engine import tokenization
from dpo.engine.packing import pack
from dpo.engine.tokenization import encode_pairs, pair_ids
from tests.support.models import (
    bare_tokenizer,
    bos_tokenizer,
    chat_tokenizer,
    metaspace_tokenizer,
    plain_tokenizer,
)

SYSTEM = "<|im_start|>system\nYou are a helpful critic.<|im_end|>\n"


def prompt_ids(tokenizer, prompt):
    return tokenization.prompt_ids(tokenizer, [prompt])[0]


def completion_ids(tokenizer, prompt, completion):
    ((_, chosen, rejected),) = pair_ids(
        tokenizer, [{"prompt": prompt, "chosen": completion, "rejected": completion}]
    )
    assert chosen == rejected
    return chosen


def bos_chat_tokenizer():
    """The template writes the start token itself, trims what is said and leaves the end of a turn bare."""
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n"
        "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    return tokenizer


MAKERS = {
    "chat": chat_tokenizer,
    "plain": plain_tokenizer,
    "bare": bare_tokenizer,
    "bos": bos_tokenizer,
    "bos-chat": bos_chat_tokenizer,
    "metaspace": metaspace_tokenizer,
}


@functools.cache
def made(name):
    return MAKERS[name]()


@pytest.fixture(params=MAKERS)
def tokenizer(request):
    return made(request.param)


PAIRS = [
    ("Say something about film 12.", " Film 3 is a joy and a delight."),
    ("Film 27", " is a bore."),
    ("naïveté —", " 日本語 🎬!"),
    ("A film 🎬", " 🎬 of joy"),
    ("x" * 40, " y"),
]


def whole_text(tokenizer, prompt, completion):
    """What prompt, answer and one end token look like as one text, from the template if there is one."""
    if not tokenizer.chat_template:
        return prompt + completion + (tokenizer.eos_token or "")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(turns, tokenize=False).rstrip()


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_completion_apart_are_what_they_are_together(tokenizer, prompt, completion):
    together = tokenizer.encode(whole_text(tokenizer, prompt, completion), add_special_tokens=False)
    if tokenizer.bos_token_id is not None and not tokenizer.chat_template:
        together = [tokenizer.bos_token_id, *together]
    assert prompt_ids(tokenizer, prompt) + completion_ids(tokenizer, prompt, completion) == together


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Film 3 is a de", "light."), ("A film\n", "\n\nand a joy"), ("Film ", " 3"), ("naï", "veté")],
)
@pytest.mark.parametrize("name", ["chat", "plain", "bare", "bos", "metaspace"])
def test_a_token_across_the_seam_moves_no_prompt_token_and_keeps_the_text(name, prompt, completion):
    tokenizer = made(name)
    first, rest = prompt_ids(tokenizer, prompt), completion_ids(tokenizer, prompt, completion)
    text = tokenizer.decode(first + rest).removeprefix(tokenizer.bos_token or "")
    text = text[name == "metaspace" :]  # it puts a space before the first word of all
    assert text == whole_text(tokenizer, prompt, completion)
    generation_prompt = "<|im_end|>\n<|im_start|>assistant\n" if name == "chat" else ""
    assert tokenizer.decode(first).endswith(prompt + generation_prompt)


def test_some_seam_is_really_crossed():
    tokenizer = made("plain")
    prompt, completion = "Film 3 is a de", "light."
    together = tokenizer.encode(prompt + completion + tokenizer.eos_token)
    assert prompt_ids(tokenizer, prompt) != together[: len(prompt_ids(tokenizer, prompt))]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(texts, texts)
def test_any_text_survives_the_seam(prompt, completion):
    tokenizer = made("plain")
    ids = prompt_ids(tokenizer, prompt) + completion_ids(tokenizer, prompt, completion)
    expected = (prompt + completion.rstrip()).encode()
    assert tokenizer.decode(ids).encode() == expected + b"<|end|>"


@pytest.mark.parametrize("ending", ["", "{end}", "{end}{end}", "{end}\n", " {end} \n{end}", "\n"])
@pytest.mark.parametrize("name", ["chat", "plain", "bos", "bos-chat", "metaspace"])
def test_there_is_exactly_one_end_token_and_it_is_last(name, ending):
    tokenizer = made(name)
    ids = completion_ids(tokenizer, "Film 3", " is a joy." + ending.format(end=tokenizer.eos_token))
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids == completion_ids(tokenizer, "Film 3", " is a joy.")


def test_without_an_end_token_none_is_made_up():
    tokenizer = made("bare")
    assert completion_ids(tokenizer, "Film", " 3") == tokenizer.encode(" 3")


@pytest.mark.parametrize("name", ["bos", "bos-chat", "metaspace"])
def test_the_start_token_stands_at_the_start_only(name):
    tokenizer = made(name)
    ids = prompt_ids(tokenizer, "Film 3") + completion_ids(tokenizer, "Film 3", " is a joy.")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_prompt_is_one_user_turn_and_the_start_of_the_answer():
    ids = prompt_ids(made("chat"), "Film 3?")
    text = SYSTEM + "<|im_start|>user\nFilm 3?<|im_end|>\n<|im_start|>assistant\n"
    assert made("chat").decode(ids) == text


def test_a_template_that_writes_the_answer_otherwise_than_it_prompts_leaves_the_plain_answer():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    assert tokenizer.decode(prompt_ids(tokenizer, "Film 3")) == "Film 3<think>"
    assert tokenizer.decode(completion_ids(tokenizer, "Film 3", "a joy")) == "a joy<|im_end|>"


def test_an_empty_prompt_becomes_the_start_or_the_end_token():
    assert prompt_ids(made("bos"), "") == [made("bos").bos_token_id]
    assert prompt_ids(made("plain"), "") == [made("plain").eos_token_id]
    with pytest.raises(ValueError, match="start or an end token"):
        prompt_ids(made("bare"), "")


def pair(**changes):
    fields = {
        "id": "p7",
        "prompt": "Say something about film 12.",
        "chosen": " A joy.",
        "rejected": " A bore, no?",
    }
    return {**fields, **changes}


def test_rows_hold_chosen_first(tokenizer):
    (row,) = encode_pairs([pair()], tokenizer, 200)
    assert row.id == "p7"
    assert list(row.prompt) == prompt_ids(tokenizer, pair()["prompt"])
    assert [list(ids) for ids in row.completions] == [
        completion_ids(tokenizer, pair()["prompt"], pair()[field]) for field in ("chosen", "rejected")
    ]


def test_a_long_prompt_loses_tokens_on_its_left_and_a_completion_none(tokenizer):
    (full,) = encode_pairs([pair()], tokenizer, 1000)
    longer = max(map(len, full.completions))
    exact = len(full.prompt) + longer
    for max_length in (exact, exact - 1, longer + 3, longer + 1):
        (cut,) = encode_pairs([pair()], tokenizer, max_length)
        assert cut.completions == full.completions
        assert cut.prompt == full.prompt[-(max_length - longer) :]
        assert len(cut.prompt) + longer == max_length


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_completion_that_leaves_no_room_is_refused_with_the_mend(tokenizer, field):
    long = pair(**{field: " joy" * 30})
    length = len(completion_ids(tokenizer, long["prompt"], long[field]))
    encode_pairs([long], tokenizer, length + 1)
    with pytest.raises(InputError) as error:
        encode_pairs([pair(id="fits"), long], tokenizer, length)
    for words in ("pair p7", f"field '{field}'", f"{length} tokens", "Raise engine.max_length or drop the pair"):
        assert words in str(error.value)


def test_a_pad_token_that_is_the_end_token_is_scored_like_any_other():
    shared, apart = chat_tokenizer(), chat_tokenizer()
    apart.pad_token = "<|im_start|>"
    assert shared.pad_token_id == shared.eos_token_id != apart.pad_token_id
    rows = encode_pairs([pair()], shared, 200)
    assert rows == encode_pairs([pair()], apart, 200)
    assert pack(rows).targets.tolist().count(shared.eos_token_id) == 2


def test_pairs_have_the_same_tokens_together_as_alone(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Film 3?"},
        {"role": "assistant", "content": "A joy."},
        {"role": "user", "content": "Why?"},
    ]
    pairs = [
        *(pair(id=str(i), prompt=prompt, chosen=completion) for i, (prompt, completion) in enumerate(PAIRS)),
        pair(prompt="Be brief. Film 3? Why?", turns=turns),
        pair(prompt="Say something about film 12."),
    ]
    assert encode_pairs(pairs, tokenizer, 400) == [encode_pairs([one], tokenizer, 400)[0] for one in pairs]


def test_a_conversation_is_rendered_turn_by_turn_where_there_is_a_template():
    turns = [
        {"role": "user", "content": "Film 3?"},
        {"role": "assistant", "content": "A joy."},
        {"role": "user", "content": "Why?"},
    ]
    (row,) = encode_pairs([pair(prompt="Film 3? Why?", turns=turns)], made("chat"), 400)
    said = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    assert made("chat").decode(row.prompt) == f"{SYSTEM}{said}<|im_start|>assistant\n"
    (row,) = encode_pairs([pair(prompt="Film 3? Why?", turns=turns)], made("plain"), 400)
    assert made("plain").decode(row.prompt) == "Film 3? Why?"
