# ruff: noqa: E501  # templates
"""Chat templates that behave like those of known models: what a pair becomes, and what is found to be lost."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dpo.common.errors import InputError
from dpo.data.checks import render, special_tokens
from dpo.engine import base_model
from dpo.engine.chat import changed_texts, end_tokens, fix_template, prompt_of, render_pairs, turn_end
from dpo.engine.logprobs import LogProbModel, load_model, sequence_logps
from dpo.engine.packing import pack
from dpo.engine.settings import ModelSettings
from dpo.engine.tokenization import encode_pairs, prompt_ids, token_rows
from dpo.evaluation.sampling import end_ids, sample
from tests.support.models import byte_level_bpe, chat_tokenizer, make_model

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
HEAD = "<|im_start|>assistant\n"
GENERATE = "{% if add_generation_prompt %}" + HEAD + "{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATE
ANSWER_ONLY = "{{ m['content'].split('</think>')[-1] }}"
THOUGHT = (
    "{{ m['content'].split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m['content'] else '' }}"
)
REPLY = "{{ m['content'].split('</think>')[-1].strip() }}"


def assistant(text, otherwise=TURN):
    """Return a template that writes the assistant's turns in another way than the others."""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + text
        + "{% else %}"
        + otherwise
        + "{% endif %}{% endfor %}"
    )


TEMPLATES = {
    "ChatML, Phi": CHATML,
    "DeepSeek-R1": assistant(f"{HEAD}{ANSWER_ONLY}<|im_end|>\n")
    + "{% if add_generation_prompt %}" + HEAD + "<think>\n{% endif %}",
    "Qwen3": assistant(f"{HEAD}<think>\n{THOUGHT}\n</think>\n\n{REPLY}<|im_end|>\n")
    + "{% if add_generation_prompt %}" + HEAD
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "QwQ": assistant(f"{HEAD}<think>\n{THOUGHT}\n</think>\n\n{REPLY}<|im_end|>\n")
    + "{% if add_generation_prompt %}" + HEAD + "<think>\n{% endif %}",
    "Gemma": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"),
    "Mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }}<|im_end|>{% endif %}{% endfor %}",
    "Llama 3": "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML,
    "lossy": assistant(f"{HEAD}{{{{ m['content'][:9] }}}}<|im_end|>\n") + GENERATE,
    "tools": "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + assistant(HEAD + "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n")
    + GENERATE,
}  # fmt: skip

ASK, GOOD, BAD = "How do rivers move?", "They follow the slope.", "No idea."
PLAIN = {"id": "1", "prompt": ASK, "chosen": GOOD, "rejected": BAD}
THINKING = {
    **PLAIN,
    "chosen": f"<think>\nWater.\n</think>\n\n{GOOD}",
    "rejected": f"<think>\nHm.\n</think>\n\n{BAD}",
}
CLOSE_ONLY = {**PLAIN, "chosen": f"Water.\n</think>\n\n{GOOD}", "rejected": f"Hm.\n</think>\n\n{BAD}"}
USER = {"role": "user", "content": ASK}


def tokenizer_of(name):
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(special), eos_token="<|im_end|>", additional_special_tokens=special[:1]
    )
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def trained(name, pair):
    """Return the chosen sequence as text, and the rules that the rendering breaks."""
    tokenizer = tokenizer_of(name)
    rendered = render_pairs(tokenizer, [pair])
    (row,) = token_rows(tokenizer, [pair], rendered)
    return tokenizer.decode([*row.prompt, *row.completions[0]]), [
        rule for rule, _ in changed_texts(pair, rendered[0])
    ]


@pytest.mark.parametrize("name", ["ChatML, Phi", "DeepSeek-R1", "Qwen3", "QwQ"])
@pytest.mark.parametrize("pair", [THINKING, CLOSE_ONLY], ids=["full thought", "only its end"])
def test_a_thought_is_written_once_and_closed_once(name, pair):
    text, broken = trained(name, pair)
    assert broken == []
    for part in (ASK, "Water.", GOOD, "</think>"):
        assert text.count(part) == 1
    assert text.count("<think>") == (name != "ChatML, Phi" or pair is THINKING)
    assert text.endswith("<|im_end|>")
    assert text.count("<|im_end|>") == 2


def test_an_answer_without_a_thought_is_refused_only_where_the_template_opens_one():
    assert trained("ChatML, Phi", PLAIN)[1] == trained("Qwen3", PLAIN)[1] == trained("QwQ", PLAIN)[1] == []
    text, broken = trained("DeepSeek-R1", PLAIN)
    assert broken == ["answer_changed"] * 2
    assert text.count("<think>") == 1


def test_a_template_that_drops_text_is_named_with_the_field():
    assert trained("lossy", PLAIN)[1] == ["answer_changed"]
    earlier = [USER, {"role": "assistant", "content": "A long earlier answer."}, USER]
    rendered = render_pairs(
        tokenizer_of("lossy"), [{**PLAIN, "turns": earlier, "chosen": "Yes.", "rejected": "No."}]
    )
    ((rule, reason),) = changed_texts(
        {**PLAIN, "turns": earlier, "chosen": "Yes.", "rejected": "No."}, rendered[0]
    )
    assert rule == "prompt_changed"
    assert "A long earlier" in reason


@pytest.mark.parametrize("name", ["ChatML, Phi", "Gemma", "Mistral"])
def test_every_text_is_written_once_and_the_end_token_is_trained_once(name):
    text, broken = trained(name, PLAIN)
    assert broken == []
    assert text.count(ASK) == text.count(GOOD) == 1
    assert text.endswith(f"{GOOD}<|im_end|>")


def test_a_template_that_refuses_a_row_raises_an_input_error():
    with pytest.raises(InputError, match="System role not supported"):
        render_pairs(tokenizer_of("Gemma"), [{**PLAIN, "turns": [{"role": "system", "content": "x"}, USER]}])


def test_a_system_text_is_moved_into_the_first_user_turn():
    tokenizer = tokenizer_of("Gemma")
    pair = {**PLAIN, "turns": [{"role": "system", "content": "Be brief."}, USER]}
    with pytest.raises(InputError, match=r"model\.system_in_user_turn moves"):
        render_pairs(tokenizer, [pair])
    fix_template(tokenizer, {}, None, system_in_user_turn=True)
    rendered, plain = render_pairs(tokenizer, [pair, PLAIN])
    assert rendered.prompt == f"<|im_start|>user\nBe brief.\n\n{ASK}<|im_end|>\n<|im_start|>assistant\n"
    assert changed_texts(pair, rendered) == []
    assert plain == render_pairs(tokenizer_of("Gemma"), [PLAIN])[0]


def test_of_several_templates_tool_use_renders_rows_with_tools(tmp_path):
    tokenizer = tokenizer_of("ChatML, Phi")
    tokenizer.chat_template = {"default": TEMPLATES["Qwen3"], "tool_use": TEMPLATES["tools"]}
    tokenizer.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with_tools, without = render_pairs(tokenizer, [TOOL_PAIR, PLAIN])
    assert with_tools == render_pairs(tokenizer_of("tools"), [TOOL_PAIR])[0]
    assert without == render_pairs(tokenizer_of("Qwen3"), [PLAIN])[0]
    assert end_tokens(tokenizer) == ("<|im_end|>",)
    assert special_tokens(tokenizer).search("<think>") is None
    fix_template(tokenizer, {"enable_thinking": False}, None)
    assert render_pairs(tokenizer, [PLAIN])[0].prompt.endswith("<think>\n\n</think>\n\n")
    tokenizer.chat_template = {"rag": TEMPLATES["tools"], "tool_use": TEMPLATES["tools"]}
    with pytest.raises(InputError, match="has the chat templates rag, tool_use, and none is `default`"):
        render_pairs(tokenizer, [PLAIN])


def test_variables_become_part_of_the_template():
    tokenizer = tokenizer_of("Qwen3")
    fix_template(tokenizer, {"enable_thinking": False}, None)
    (rendered,) = render_pairs(tokenizer, [PLAIN])
    assert rendered.prompt.endswith("<think>\n\n</think>\n\n")
    assert rendered.completions == ((GOOD,), (BAD,))
    assert changed_texts(PLAIN, rendered) == []


def test_a_date_in_a_template_is_fixed_or_refused():
    tokenizer = tokenizer_of("Llama 3")
    with pytest.raises(InputError, match=r"writes today's date; set model\.date to a day such as"):
        fix_template(tokenizer, {}, None)
    fix_template(tokenizer, {}, "2026-11-26")
    assert "Today: 26 Nov 2026" in render_pairs(tokenizer, [PLAIN])[0].prompt
    tokenizer.chat_template = "{{ strftime_now(form) }}"
    with pytest.raises(InputError, match="cannot be fixed"):
        fix_template(tokenizer, {}, "2026-11-26")


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": '[{"type": "function", "function": {"name": "flow", "arguments": {"river": "Elbe"}}}]',
}
TOOL_PAIR = {
    **PLAIN,
    "tools": '[{"type": "function", "function": {"name": "flow", "parameters": {}}}]',
    "chosen_turns": [CALL],
    "rejected_turns": [{**CALL, "tool_calls": CALL["tool_calls"].replace("Elbe", "Oder")}],
}


def test_tools_and_calls_are_written_or_the_pair_is_refused():
    text, broken = trained("tools", TOOL_PAIR)
    assert broken == []
    assert '"parameters"' in text
    assert text.endswith('<call>{"name": "flow", "arguments": {"river": "Elbe"}}</call><|im_end|>')
    assert trained("ChatML, Phi", TOOL_PAIR)[1] == ["tools_unsupported"] * 3


MORE = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "The sea."}]
SEVERAL = {**PLAIN, "chosen_turns": [{"role": "assistant", "content": GOOD}, *MORE]}


def test_of_several_turns_those_of_the_assistant_are_scored(tmp_path):
    tokenizer = chat_tokenizer()
    (row,) = encode_pairs([SEVERAL], tokenizer, 1000)
    ids = row.completions[0]
    scored = [token for place, token in enumerate(ids) if place not in row.context[0]]
    assert tokenizer.decode(scored) == f"{GOOD}<|im_end|>The sea.<|im_end|>"
    context = tokenizer.decode([ids[place] for place in row.context[0]])
    assert context == "\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    assert row.lengths == (len(scored), len(row.completions[1]))
    folder = make_model("llama", tmp_path / "model", vocab_size=len(tokenizer), max_position_embeddings=512)
    model, plain = load_model(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = torch.tensor([[*row.prompt, *ids]])
    with torch.no_grad():
        logps = plain(whole).logits[0].log_softmax(1)
    places = [len(row.prompt) + place for place in range(len(ids)) if place not in row.context[0]]
    expected = sum(logps[place - 1, whole[0, place]] for place in places)
    other = dataclasses.replace(row, completions=row.completions[1:], context=())
    packed = sequence_logps(model, [row], 1000)[0]
    assert packed[0].item() == pytest.approx(expected.item(), rel=1e-4)
    assert packed[1].item() == pytest.approx(sequence_logps(model, [other], 1000)[0, 0].item(), rel=1e-4)
    by_row = sequence_logps(LogProbModel(plain, in_stream=False), [row], 1000)[0]
    torch.testing.assert_close(by_row, packed, rtol=1e-4, atol=1e-4)
    assert pack([row]).lengths.tolist() == list(row.lengths)


def test_a_turn_that_ends_with_another_token_than_the_tokenizer_has(tmp_path):
    tokenizer = tokenizer_of("ChatML, Phi")
    tokenizer.eos_token = "<|im_start|>"  # as a base model with ChatML, whose end token is another one
    assert (turn_end(tokenizer), end_tokens(tokenizer)) == ("<|im_end|>", ("<|im_end|>", "<|im_start|>"))
    (row,) = encode_pairs([PLAIN], tokenizer, 1000)
    assert tokenizer.decode(row.completions[0]) == f"{GOOD}<|im_end|>"
    folder = make_model("llama", tmp_path / "model", vocab_size=len(tokenizer), max_position_embeddings=512)
    model = load_model(folder)
    model.model.generation_config.eos_token_id = [7, 9]
    ends = end_ids(model.model.generation_config, tokenizer)
    assert ends == [0, 1, 7, 9]
    responses = sample(model, tokenizer, ["film"] * 60, max_new_tokens=60, temperature=2.0, seed=3)
    stopped = [ids for ids in responses if len(ids) < 60]
    assert {ids[-1] for ids in stopped} == set(ends)
    assert all(not set(ids[:-1]) & set(ends) for ids in responses)


def test_a_model_with_fewer_embeddings_than_tokens_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer()
    folder = make_model("llama", base_model.OWN_MODELS / "outgrown", vocab_size=len(tokenizer))
    tokenizer.add_tokens(["rivers", "glass"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"model.base: .* has 320 embeddings, its tokenizer 322 tokens; resize"):
        base_model.load_base(ModelSettings(base=str(folder)))


def with_variables(**variables):
    return {**PLAIN, "chat_template_kwargs": json.dumps(variables)}


def test_variables_of_a_row_hold_for_the_prompt_and_both_completions():
    tokenizer = tokenizer_of("Qwen3")
    pairs = [with_variables(enable_thinking=False), PLAIN, with_variables(enable_thinking=True)]
    off, plain, on = render_pairs(tokenizer, pairs)
    assert off.prompt == f"{plain.prompt}<think>\n\n</think>\n\n"
    assert off.completions == ((GOOD,), (BAD,))
    assert plain == on == render_pairs(tokenizer, [PLAIN])[0]
    fix_template(tokenizer, {"enable_thinking": False}, None)
    assert render_pairs(tokenizer, pairs) == [off, off, on]  # those of the row win


def test_variables_of_a_row_survive_the_truncation_of_its_prompt():
    tokenizer = tokenizer_of("Qwen3")
    pair = with_variables(enable_thinking=False)
    pair["turns"] = [USER, {"role": "assistant", "content": GOOD * 20}, USER]
    (row,) = encode_pairs([pair], tokenizer, 120)
    assert tokenizer.decode(row.prompt) == render_pairs(tokenizer, [{**pair, "turns": [USER]}])[0].prompt
    prompt = prompt_of(pair, tokenizer)
    assert prompt_ids(tokenizer, [prompt], len(row.prompt)) == [list(row.prompt)]


@pytest.mark.parametrize(
    ("name", "variables", "unknown"),
    [
        ("Qwen3", {"enable_thinking": False}, None),
        ("Qwen3", {"enable_thinking": False, "xml_tools": [], "custom_instructions": ""}, None),
        ("Qwen3", {"reasoning_effort": "high", "enable_thinking": True}, "reasoning_effort"),
        ("ChatML, Phi", {"enable_thinking": False}, "enable_thinking"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_refused(name, variables, unknown):
    _, (broken,) = render(tokenizer_of(name), [with_variables(**variables)])
    assert [rule for rule, _ in broken] == ["template_refuses"] * bool(unknown)
    assert unknown is None or repr(unknown) in broken[0][1]


def test_a_variable_of_a_type_that_the_template_refuses_costs_only_its_row():
    tokenizer = tokenizer_of("ChatML, Phi")
    tokenizer.chat_template = "{% if effort is defined %}{{ effort.split('-')[0] }}{% endif %}" + CHATML
    texts, broken = render(tokenizer, [with_variables(effort=["low"]), PLAIN, with_variables(effort="low-1")])
    assert [text is None for text in texts] == [True, False, False]
    assert [[rule for rule, _ in rules] for rules in broken] == [["template_refuses"], [], []]
