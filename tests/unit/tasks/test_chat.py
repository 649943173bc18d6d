"""`dpo chat`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tasks.commands import chat as command
from tasks.commands.chat import _columns, _start
from tasks.commands.cli import app

ROOT = Path(__file__).parents[3]


@pytest.fixture
def chat(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "policy")

    def run(words, *options):
        command = ["chat", str(tmp_path / "policy"), "--reference", str(tiny_model_dir), "--max-new-tokens", "5"]
        done = CliRunner().invoke(app, [*command, *options], input=words)
        assert done.exit_code == 0
        return done.stdout

    return run


def test_chat_prints_both_responses_until_quit_or_end_of_input(chat, tiny_model_dir):
    shown = chat("Hello\n/new\n\nHello\n/quit\n")
    first, second = shown.split("\n> ")[1], shown.split("\n> ")[4]
    assert "policy" in first
    assert first.strip() == second.strip(), "a new conversation with the same seed gives the same response"
    assert chat("Hello\n").count("> ") == 2, "the chat ends with the input"


def test_responses_depend_on_the_conversation_and_the_seed(chat):
    shown = chat("Hello\nHello\n", "--temperature", "0.01")
    first, second = shown.split("\n> ")[1:3]
    assert first.strip() != second.strip()
    assert chat("Hello\n", "--seed", "1") != chat("Hello\n", "--seed", "2")


def test_chat_refuses_a_folder_without_a_checkpoint():
    command = [sys.executable, "-m", "tasks.commands.cli", "chat", "absent"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "absent: no checkpoint;" in done.stderr
    assert "Traceback" not in done.stderr


def test_columns_are_side_by_side_or_one_below_the_other_in_a_narrow_terminal():
    wide = _columns(["a", "b"], ["one two", "three\nfour"], 80).splitlines()
    assert [line.split("|")[1].strip() for line in wide] == ["b", "-", "three", "four"]
    assert all(len(line) <= 80 for line in wide)
    assert _columns(["a", "b"], ["one", "two"], 40) == "a:\none\n\nb:\ntwo"


def answers(shown):
    return [part.strip().rsplit("\n", 1)[-1] for part in shown.split("\n> ")[1:]]


def test_redo_samples_the_last_response_again_with_the_next_seed(chat):
    first, again, third = answers(chat("Hello\n/redo\n/redo\n"))[:3]
    assert len({first, again, third}) == 3
    assert answers(chat("Hello\n/redo\n", "--seed", "0"))[1] == again
    assert answers(chat("Hello\n", "--seed", "1"))[0] == again, "the conversation is that of the first prompt"
    assert "There is no response yet" in chat("/redo\n")


def test_a_system_prompt_starts_a_conversation_and_changes_the_response(chat):
    plain, _, instructed = answers(chat("Hello\n/system Talk like a pirate.\nHello\n"))[:3]
    assert plain != instructed


def test_a_model_without_a_system_prompt_says_so(capsys):
    class Tokenizer:
        def apply_chat_template(self, messages, tokenize):
            raise ValueError("System role not supported")

    assert _start(Tokenizer(), "Be brief.") == []
    assert "no system prompt: System role not supported" in capsys.readouterr().out


def test_the_base_model_speaks_too_if_the_reference_was_trained_from_it(
    tiny_model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "reference", "base"):
        shutil.copytree(tiny_model_dir, f"models/{name}")
    words = iter(["Hello", "/quit"] * 2)
    monkeypatch.setattr("builtins.input", lambda _: next(words))
    options = {"max_new_tokens": 3, "temperature": 0.7, "seed": 0}
    for base, spoken in (("same", False), ("other", True)):
        facts = {"models": {"models/base": base}, "weights": "same"}
        Path("models/reference/provenance.json").write_text(json.dumps(facts))
        command.chat(Path("models/policy"), Path("models/reference"), **options)
        assert ("models/base" in capsys.readouterr().out) is spoken
