"""Tokenization: the boundary of prompt and completion, start and end tokens, truncation."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.common.errors import InputError
from dpo.engine import tokenization
from dpo.engine.chat import render_pairs
from dpo.engine.packing import pack
from dpo.engine.tokenization import encode_pairs, token_rows
from tests.support.examples import examples
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
    pairs = [{"id": "1", "prompt": prompt, "chosen": completion, "rejected": completion}]
    ((chosen, rejected),) = (
        row.completions for row in token_rows(tokenizer, pairs, render_pairs(tokenizer, pairs))
    )
    assert chosen == rejected
    return list(chosen)


def bos_chat_tokenizer():
    """Return a tokenizer whose template adds the start token, strips turns and adds no newline after a turn."""
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


def full_text(tokenizer, prompt, completion):
    """Return prompt, response and one end token as one text, from the chat template if there is one."""
    if not tokenizer.chat_template:
        return prompt + completion + (tokenizer.eos_token or "")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(turns, tokenize=False).rstrip()


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_completion_have_the_tokens_of_the_full_text(tokenizer, prompt, completion):
    together = tokenizer.encode(full_text(tokenizer, prompt, completion), add_special_tokens=False)
    if tokenizer.bos_token_id is not None and not tokenizer.chat_template:
        together = [tokenizer.bos_token_id, *together]
    assert prompt_ids(tokenizer, prompt) + completion_ids(tokenizer, prompt, completion) == together


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Film 3 is a de", "light."), ("A film\n", "\n\nand a joy"), ("Film ", " 3"), ("naï", "veté")],
)
@pytest.mark.parametrize("name", ["chat", "plain", "bare", "bos", "metaspace"])
def test_a_token_that_would_span_the_boundary_is_split(name, prompt, completion):
    tokenizer = made(name)
    first, rest = prompt_ids(tokenizer, prompt), completion_ids(tokenizer, prompt, completion)
    text = tokenizer.decode(first + rest).removeprefix(tokenizer.bos_token or "")
    text = text[name == "metaspace" :]  # this tokenizer adds a space to the first word
    assert text == full_text(tokenizer, prompt, completion)
    generation_prompt = "<|im_end|>\n<|im_start|>assistant\n" if name == "chat" else ""
    assert tokenizer.decode(first).endswith(prompt + generation_prompt)


def test_a_token_spans_the_boundary_in_the_full_text():
    tokenizer = made("plain")
    prompt, completion = "Film 3 is a de", "light."
    together = tokenizer.encode(prompt + completion + tokenizer.eos_token)
    assert prompt_ids(tokenizer, prompt) != together[: len(prompt_ids(tokenizer, prompt))]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@examples(200)
@given(texts, texts)
def test_any_text_is_decoded_unchanged(prompt, completion):
    tokenizer = made("plain")
    ids = prompt_ids(tokenizer, prompt) + completion_ids(tokenizer, prompt, completion)
    expected = (prompt + completion.rstrip()).encode()
    assert tokenizer.decode(ids).encode() == expected + b"<|end|>"


@pytest.mark.parametrize("ending", ["", "{end}", "{end}{end}", "{end}\n", " {end} \n{end}", "\n"])
@pytest.mark.parametrize("name", ["chat", "plain", "bos", "bos-chat", "metaspace"])
def test_a_completion_has_exactly_one_end_token_at_its_end(name, ending):
    tokenizer = made(name)
    ids = completion_ids(tokenizer, "Film 3", " is a joy." + ending.format(end=tokenizer.eos_token))
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids == completion_ids(tokenizer, "Film 3", " is a joy.")


def test_no_end_token_is_added_if_the_tokenizer_has_none():
    tokenizer = made("bare")
    assert completion_ids(tokenizer, "Film", " 3") == tokenizer.encode(" 3")


@pytest.mark.parametrize("name", ["bos", "bos-chat", "metaspace"])
def test_the_start_token_is_only_at_the_start(name):
    tokenizer = made(name)
    ids = prompt_ids(tokenizer, "Film 3") + completion_ids(tokenizer, "Film 3", " is a joy.")
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_prompt_is_one_user_turn_with_a_generation_prompt():
    ids = prompt_ids(made("chat"), "Film 3?")
    text = SYSTEM + "<|im_start|>user\nFilm 3?<|im_end|>\n<|im_start|>assistant\n"
    assert made("chat").decode(ids) == text


def test_the_plain_completion_is_used_if_the_template_does_not_continue_the_prompt():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    assert tokenizer.decode(prompt_ids(tokenizer, "Film 3")) == "Film 3<think>"
    assert tokenizer.decode(completion_ids(tokenizer, "Film 3", "a joy")) == "a joy<|im_end|>"


def test_an_empty_prompt_becomes_the_start_or_end_token():
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


def test_rows_have_the_chosen_completion_first(tokenizer):
    (row,) = encode_pairs([pair()], tokenizer, 200)
    assert row.id == "p7"
    assert list(row.prompt) == prompt_ids(tokenizer, pair()["prompt"])
    assert [list(ids) for ids in row.completions] == [
        completion_ids(tokenizer, pair()["prompt"], pair()[field]) for field in ("chosen", "rejected")
    ]


def test_a_prompt_loses_the_start_of_its_last_turn_and_completions_lose_nothing(tokenizer):
    long = pair(prompt="Say something about a film that was long. " * 9)
    (full,) = encode_pairs([long], tokenizer, 1000)
    longer = max(map(len, full.completions))
    for room in (len(full.prompt), len(full.prompt) - 1, 60, 3, 1):
        (cut,) = encode_pairs([long], tokenizer, room + longer)
        assert cut.completions == full.completions
        assert len(cut.prompt) == room
        head = next((n for n in range(room, -1, -1) if cut.prompt[:n] == full.prompt[:n]), 0)
        assert cut.prompt[head:] == full.prompt[len(full.prompt) - (room - head) :]
        if tokenizer.chat_template and room == 60:
            start = tokenizer.decode(cut.prompt)
            whole = tokenizer.decode(full.prompt)
            assert start[: whole.index("Say")] == whole[: whole.index("Say")], (
                "what the template writes first stays"
            )


def test_a_conversation_loses_its_oldest_turns_first_and_keeps_its_system_turn():
    tokenizer = chat_tokenizer()
    turns = [{"role": "system", "content": "Be brief."}]
    for number in range(4):
        turns += [
            {"role": "user", "content": f"Film {number}?"},
            {"role": "assistant", "content": f"A joy {number}."},
        ]
    turns.append({"role": "user", "content": "Why?"})
    conversation = pair(turns=turns)
    (full,) = encode_pairs([conversation], tokenizer, 1000)
    longer = max(map(len, full.completions))
    (cut,) = encode_pairs([conversation], tokenizer, len(full.prompt) - 1 + longer)
    kept = [turns[0], *turns[3:]]
    assert list(cut.prompt) == prompt_ids(tokenizer, kept)
    (short,) = encode_pairs([conversation], tokenizer, len(prompt_ids(tokenizer, [turns[0], turns[-1]])) + longer)
    assert list(short.prompt) == prompt_ids(tokenizer, [turns[0], turns[-1]])


def test_a_long_conversation_is_shortened_with_few_renderings(monkeypatch):
    tokenizer = chat_tokenizer()
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"Film {n}?"} for n in range(401)]
    whole = prompt_ids(tokenizer, turns)
    rendered = []
    render = tokenization.render_prompts
    monkeypatch.setattr(tokenization, "render_prompts", lambda *args: rendered.append(args) or render(*args))
    for kept in (3, 101, 399):
        newest = tokenization._prompt_ids(tokenizer, render(tokenizer, [turns[-kept:]]))[0]
        assert tokenization.shortened(tokenizer, turns, whole, len(newest)) == newest
        assert tokenization.shortened(tokenizer, turns, whole, len(newest) + 3) == newest
    assert len(rendered) < 6 * 12


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_completion_that_leaves_no_room_for_the_prompt_is_an_error(tokenizer, field):
    long = pair(**{field: " joy" * 30})
    length = len(completion_ids(tokenizer, long["prompt"], long[field]))
    encode_pairs([long], tokenizer, length + 1)
    with pytest.raises(InputError) as error:
        encode_pairs([pair(id="fits"), long], tokenizer, length)
    for words in ("pair p7", f"field '{field}'", f"{length} tokens", "Raise engine.max_length or drop the pair"):
        assert words in str(error.value)


def test_an_end_token_that_is_the_pad_token_is_scored():
    shared, separate = chat_tokenizer(), chat_tokenizer()
    separate.pad_token = "<|im_start|>"
    assert shared.pad_token_id == shared.eos_token_id != separate.pad_token_id
    rows = encode_pairs([pair()], shared, 200)
    assert rows == encode_pairs([pair()], separate, 200)
    assert pack(rows).targets.tolist().count(shared.eos_token_id) == 2


def test_tokens_of_a_pair_do_not_depend_on_other_pairs(tokenizer):
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


def test_a_conversation_is_rendered_by_the_chat_template():
    turns = [
        {"role": "user", "content": "Film 3?"},
        {"role": "assistant", "content": "A joy."},
        {"role": "user", "content": "Why?"},
    ]
    (row,) = encode_pairs([pair(prompt="Film 3? Why?", turns=turns)], made("chat"), 400)
    rendered = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    assert made("chat").decode(row.prompt) == f"{SYSTEM}{rendered}<|im_start|>assistant\n"
    (row,) = encode_pairs([pair(prompt="Film 3? Why?", turns=turns)], made("plain"), 400)
    assert made("plain").decode(row.prompt) == "Film 3? Why?"
