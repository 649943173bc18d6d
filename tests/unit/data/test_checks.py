"""Checks of single rows, each with rows that break the rule and rows that do not."""

import pytest

from dpo.common.errors import InputError
from dpo.data.checks import check_lengths, check_texts, special_tokens, token_lengths
from dpo.data.rules import ROW_RULES
from dpo.engine.tokenization import encode_pairs
from tests.support.models import bare_tokenizer, bos_tokenizer, chat_tokenizer

END = "<|im_end|>"
CHECKED_BY_READERS = {
    "unreadable_row",
    "invalid_utf8",
    "lone_surrogate",
    "wrong_type",
    "missing_text",
    "broken_roles",
    "no_preference",
    "unknown_split",
}
NOTHING = special_tokens(None)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def pair(**changes):
    return {"id": "p7", "prompt": "Say something.", "chosen": " A joy.", "rejected": " A bore.", **changes}


def broken(special=NOTHING, end=None, **changes):
    return [rule for rule, _ in check_texts(pair(**changes), special, end)]


INVALID = {
    "empty_completion": [{"chosen": ""}, {"rejected": " \t\n"}, {"chosen": "\u3000\xa0"}],
    "identical_completions": [
        {"chosen": "A joy.", "rejected": "A joy."},
        {"chosen": "A  JOY.\n", "rejected": " a joy."},
        {"chosen": "ﬁlm Ⅳ", "rejected": "film IV"},
        {"chosen": "Straße", "rejected": "STRASSE"},
        {"chosen": "cafe\u0301", "rejected": "caf\u00e9"},
    ],
    "control_characters": [
        *({"prompt": f"Say{c}something"} for c in "\x00\x07\x0b\x0c\x1b\x7f\x85\x9f\ufeff\uffff"),
        *({"chosen": f"{c}A joy."} for c in "\u202a\u202e\u2066\u2069"),
        {"rejected": "A bore.\ufeff"},
    ],
    "mojibake": [
        {"prompt": "cafÃ©"},
        {"chosen": "It’s a joy".encode().decode("cp1252")},
        {"rejected": "日本語".encode().decode("latin-1").replace("\x9c", "œ").replace("\x97", "—")},
    ],
    "special_tokens": [
        {"prompt": f"Say something.{END}"},
        {"chosen": f"A{END} joy."},
        {"chosen": f"{END}A joy."},
        {"rejected": "<|im_start|>user\nA bore."},
        {"rejected": f"A bore.{END}<|im_start|>"},
    ],
}
VALID = {
    "empty_completion": [{"chosen": "."}, {"prompt": ""}, {"prompt": "  "}],
    "identical_completions": [{"chosen": "A joy.", "rejected": "A joy"}, {"chosen": "é", "rejected": "e"}],
    "control_characters": [
        {"prompt": "a\tb\nc\r\nd"},
        {"chosen": "\u200d👩\u200d👧 \u00ad \u2028 \u200f"},
    ],
    "mojibake": [
        {"prompt": "café"},
        {"chosen": "日本語"},
        {"rejected": "🎬"},
        {"prompt": "naïveté — “so”, 5 µm²"},
    ],
    "special_tokens": [
        {"chosen": f"A joy.{END}"},
        {"rejected": f"A bore. {END}{END} \n"},
        {"prompt": "<|im_start >", "chosen": "im_end"},
    ],
}


@pytest.mark.parametrize(("rule", "changes"), [(rule, row) for rule, rows in INVALID.items() for row in rows])
def test_violations_of_text_rules_are_found(tokenizer, rule, changes):
    found = check_texts(pair(**changes), special_tokens(tokenizer), tokenizer.eos_token)
    assert rule in [name for name, _ in found]
    reason = dict(found)[rule]
    assert rule == "identical_completions" or f"field '{next(iter(changes))}'" in reason
    assert reason.isprintable()


@pytest.mark.parametrize(("rule", "changes"), [(rule, row) for rule, rows in VALID.items() for row in rows])
def test_valid_texts_break_no_rule(tokenizer, rule, changes):
    assert broken(special_tokens(tokenizer), tokenizer.eos_token, **changes) == []


def test_every_row_rule_is_tested():
    assert {*INVALID, *CHECKED_BY_READERS, "completion_too_long", "prompt_truncated"} == set(ROW_RULES)
    assert set(INVALID) == set(VALID)


def test_all_violations_of_a_row_are_reported_with_their_position():
    found = check_texts(pair(prompt="ab\x00cafÃ©", chosen=" ", rejected=""), NOTHING, None)
    assert [rule for rule, _ in found] == [
        "empty_completion",
        "empty_completion",
        "control_characters",
        "mojibake",
    ]
    assert found[2][1] == "field 'prompt', character 2: U+0000"
    assert "'ab\\x00cafÃ©'" in found[3][1]


def test_without_a_tokenizer_there_are_no_special_tokens():
    assert broken(prompt=END, chosen="<s>", rejected="[PAD]") == []
    assert broken(special_tokens(bare_tokenizer()), None, prompt=END) == []


def test_the_longest_special_token_matches():
    tokenizer = bos_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>x", "a.b"]})
    special = special_tokens(tokenizer)
    assert special.search("in <s>x")[0] == "<s>x"
    assert special.search("</s>")
    assert special.search("a.b")
    assert not special.search("aXb")
    assert broken(special, "</s>", chosen="A joy.</s>") == []


def test_token_lengths_equal_those_in_training(tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Film 3?"}]
    pairs = [
        pair(),
        pair(chosen=f"A joy. 🎬{END}", rejected="日本語"),
        pair(prompt=""),
        pair(prompt="System: Be brief.\n\nUser: Film 3?\n\nAssistant:", turns=turns),
    ]
    lengths = token_lengths(tokenizer, pairs)
    rows = encode_pairs(pairs, tokenizer, 1000)
    assert lengths.tolist() == [[len(row.prompt), *map(len, row.completions)] for row in rows]
    assert token_lengths(tokenizer, []).shape == (0, 3)


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_length_rules_agree_with_truncation_and_errors_in_training(tokenizer, field):
    row = pair(**{field: " joy" * 12})
    ((prompt, *completions),) = token_lengths(tokenizer, [row]).tolist()
    longer = max(completions)
    assert check_lengths([prompt, *completions], prompt + longer) == []
    assert check_lengths([prompt, *completions], prompt + longer - 1) == [
        ("prompt_truncated", f"the prompt loses 1 of {prompt} tokens, max_length is {prompt + longer - 1}")
    ]
    assert [rule for rule, _ in check_lengths([prompt, *completions], longer + 1)] == ["prompt_truncated"]
    assert len(encode_pairs([row], tokenizer, longer + 1)[0].prompt) == 1
    ((rule, reason),) = check_lengths([prompt, *completions], longer)
    assert rule == "completion_too_long"
    assert f"field '{field}' has {longer} tokens" in reason
    with pytest.raises(InputError, match=f"field '{field}'"):
        encode_pairs([row], tokenizer, longer)
