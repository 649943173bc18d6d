"""`dpo chat`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tasks.commands.chat import _columns
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
