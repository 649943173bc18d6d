"""Checks of single rows, each with rows that break the rule and rows that do not."""

import re

import pytest

from dpo.common.errors import InputError
from dpo.data.checks import check_lengths, check_texts, special_tokens
from dpo.data.rules import ROW_RULES
from dpo.engine.chat import render_pairs
from dpo.engine.tokenization import encode_pairs, token_rows
from tests.support.models import bare_tokenizer, bos_tokenizer, chat_tokenizer

END = "<|im_end|>"
CHECKED_BY_READERS = {
    "unknown_label",
    "unreadable_row",
    "invalid_utf8",
    "lone_surrogate",
    "wrong_type",
    "missing_text",
    "broken_roles",
    "no_preference",
    "unknown_split",
    "unread_content",
}
CHECKED_BY_RENDERING = {"template_refuses", "answer_changed", "tools_unsupported", "prompt_changed"}
NOTHING = special_tokens(None)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


def pair(**changes):
    return {"id": "p7", "prompt": "Say something.", "chosen": " A joy.", "rejected": " A bore.", **changes}


def broken(special=NOTHING, end=None, **changes):
    return [rule for rule, _ in check_texts(pair(**changes), special, [end] if end else [])]


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
        *({"prompt": f"Say{c}something"} for c in "\x00\x07\x0b\x1b\x7f\x85\x9f\uffff"),
        {"rejected": "A bore.\x80"},
    ],
    "rendered_text": [
        {"prompt": "<|im_start|>user\nSay.<|im_end|>\n<|im_start|>assistant\n"},
        {"prompt": "<|user|>\nSay something.\n<|assistant|>\n"},
        {"prompt": "[INST] Say something. [/INST]"},
        {"prompt": "<start_of_turn>user\nSay.<end_of_turn>\n<start_of_turn>model\n"},
        {"prompt": "Below is an instruction.\n\n### Instruction:\nSay.\n\n### Response:"},
    ],
    "mojibake": [
        {"prompt": "cafÃ©"},
        {"rejected": "梦想职业规划所需的工\ufffd\ufffd\ufffd和知识"},
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
        {"prompt": "مرحبا‏، ما هو \u202bالماء\u202c؟", "chosen": "\u2067שלום\u2069", "rejected": "page\x0cpage"},
    ],
    "rendered_text": [
        {"prompt": "What does [INST] mean in a prompt of Llama 2?"},
        {"chosen": "After [/INST] the model answers, as after <|assistant|> in Zephyr."},
    ],
    "mojibake": [
        {"prompt": "café"},
        {"chosen": "日本語"},
        {"rejected": "🎬"},
        {"prompt": "naïveté — “so”, 5 µm²"},
        {"chosen": "”etelä” on suomea"},
        {"prompt": "\ufeffSay something."},
    ],
    "special_tokens": [
        {"chosen": f"A joy.{END}"},
        {"rejected": f"A bore. {END}{END} \n"},
        {"prompt": "<|im_start >", "chosen": "im_end"},
    ],
}


@pytest.mark.parametrize(("rule", "changes"), [(rule, row) for rule, rows in INVALID.items() for row in rows])
def test_violations_of_text_rules_are_found(tokenizer, rule, changes):
    found = check_texts(pair(**changes), special_tokens(tokenizer), [tokenizer.eos_token])
    assert rule in [name for name, _ in found]
    reason = dict(found)[rule]
    assert rule == "identical_completions" or f"field '{next(iter(changes))}'" in reason
    assert reason.isprintable()


@pytest.mark.parametrize(("rule", "changes"), [(rule, row) for rule, rows in VALID.items() for row in rows])
def test_valid_texts_break_no_rule(tokenizer, rule, changes):
    assert broken(special_tokens(tokenizer), tokenizer.eos_token, **changes) == []


def test_every_row_rule_is_tested():
    assert {
        *INVALID,
        *CHECKED_BY_READERS,
        *CHECKED_BY_RENDERING,
        "completion_too_long",
        "prompt_truncated",
        "contaminated",
    } == set(ROW_RULES)
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


def test_the_tags_of_a_thought_may_be_special_tokens():
    pattern = re.compile("<think>|</think>")
    for text in ("<think>\nHm.\n</think>\nA joy.", "Hm.\n</think>\nA joy."):
        assert check_texts(pair(chosen=text), pattern, ()) == []
    for text in ("A joy. <think>", "<think>Hm.</think>A</think> joy.", "<think><think>Hm.</think> A joy."):
        assert [rule for rule, _ in check_texts(pair(chosen=text), pattern, ())] == ["special_tokens"]
    assert [rule for rule, _ in check_texts(pair(prompt="<think>"), pattern, ())] == ["special_tokens"]


def test_without_a_tokenizer_there_are_no_special_tokens():
    assert broken(prompt=END, chosen="<s>", rejected="[PAD]") == []
    assert broken(special_tokens(bare_tokenizer()), None, prompt=END) == []


LANGUAGES = [
    "The rivers, which rise in the hills, flow to the sea.",
    "Der Fluß fließt über Geröll; „schön“, nicht wahr?",
    "Le fleuve s'élargit — n'est-ce pas ? « Bien sûr ! »",
    "El río crece: ¿cuándo? ¡Mañana, señor!",
    "O rio não é tão fundo; a água está fria às três, irmã.",
    "Il fiume è più largo, perché piove; così è la città.",
    "Река течёт медленно, «как всегда».",
    "تجري الأنهار إلى البحر، أليس كذلك؟",
    "\u202bهذا نص عربي مع علامات\u202c",
    "הנהר זורם אל הים, נכון?",
    "\u2067שלום עולם\u2069 ועוד",
    "河流流向大海，对吗？",
    "川は海へ流れます。「そうですね」",
    "नदियाँ समुद्र में बहती हैं।",
    "강은 바다로 흐른다.",
    "Nehir denize akar; değil mi, çocuğum?",
    "Rzeka płynie, źródło bije, żaba śpi.",
    "Řeka teče k moři, že ano? Příliš žluťoučký kůň.",
    "Dòng sông chảy ra biển, phải không?",
    "Ο ποταμός κυλά προς τη θάλασσα.",
    "A\x0cnew page begins here.",
    "Zażółć gęślą jaźń – 5 µm² ≈ ½ × 10³ €",
]


@pytest.mark.parametrize("text", LANGUAGES)
def test_texts_in_many_languages_break_no_rule(tokenizer, text):
    assert len(LANGUAGES) == 22
    assert (
        broken(special_tokens(tokenizer), tokenizer.eos_token, prompt=text, chosen=text + " A", rejected=text)
        == []
    )


def test_the_longest_special_token_matches():
    tokenizer = bos_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>x", "a.b"]})
    special = special_tokens(tokenizer)
    assert special.search("in <s>x")[0] == "<s>x"
    assert special.search("</s>")
    assert special.search("a.b")
    assert not special.search("aXb")
    assert broken(special, "</s>", chosen="A joy.</s>") == []


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_length_rules_agree_with_truncation_and_errors_in_training(tokenizer, field):
    row = pair(**{field: " joy" * 12})
    (encoded,) = token_rows(tokenizer, [row], render_pairs(tokenizer, [row]))
    prompt, completions = len(encoded.prompt), list(map(len, encoded.completions))
    longer = max(completions)
    assert check_lengths([prompt, *completions], prompt + longer) == []
    limit = prompt + longer - 1
    assert check_lengths([prompt, *completions], limit) == [
        (
            "prompt_truncated",
            f"1 of {prompt} prompt tokens do not fit max_length {limit}; the start of the prompt is cut",
        )
    ]
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    assert "the start of the prompt" in check_lengths([9, 1, 1], 9, turns[:2])[0][1]
    assert "the oldest turns" in check_lengths([9, 1, 1], 9, turns)[0][1]
    assert [rule for rule, _ in check_lengths([prompt, *completions], longer + 1)] == ["prompt_truncated"]
    assert len(encode_pairs([row], tokenizer, longer + 1)[0].prompt) == 1
    ((rule, reason),) = check_lengths([prompt, *completions], longer)
    assert rule == "completion_too_long"
    assert f"field '{field}' has {longer} tokens" in reason
    with pytest.raises(InputError, match=f"field '{field}'"):
        encode_pairs([row], tokenizer, longer)
