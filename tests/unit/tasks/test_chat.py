"""Talking to a policy and its reference in the terminal."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.commands.chat import _columns

ROOT = Path(__file__).parents[3]


@pytest.fixture
def talk(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "policy")

    def answer(words, *options, policy="policy"):
        command = [
            sys.executable,
            "-m",
            "tasks.commands.chat",
            str(tmp_path / policy),
            "--reference",
            str(tiny_model_dir),
        ]
        done = subprocess.run(
            [*command, "--max-new-tokens", "5", *options], cwd=ROOT, input=words, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return answer


def test_both_answer_each_prompt_until_the_end(talk, tiny_model_dir):
    code, shown, _ = talk("Hello\n/new\n\nHello\n/quit\n")
    assert code == 0
    first, second = shown.split("\n> ")[1], shown.split("\n> ")[4]
    assert "policy" in first
    assert first.strip() == second.strip(), "a new conversation and the same seed give the same answers"
    assert talk("Hello\n")[1].count("> ") == 2, "the end of the input ends the talk"


def test_the_conversation_goes_on_and_the_seed_decides(talk):
    _, shown, _ = talk("Hello\nHello\n", "--temperature", "0.01")
    first, second = shown.split("\n> ")[1:3]
    assert first.strip() != second.strip()
    assert talk("Hello\n", "--seed", "1")[1] != talk("Hello\n", "--seed", "2")[1]


def test_a_folder_without_a_checkpoint_is_named(talk):
    code, _, errors = talk("", policy="absent")
    assert code == 2
    assert "absent: no checkpoint here" in errors
    assert "Traceback" not in errors


def test_texts_stand_side_by_side_or_below_one_another():
    wide = _columns(["a", "b"], ["one two", "three\nfour"], 80).splitlines()
    assert [line.split("|")[1].strip() for line in wide] == ["b", "-", "three", "four"]
    assert all(len(line) <= 80 for line in wide)
    assert _columns(["a", "b"], ["one", "two"], 40) == "a:\none\n\nb:\ntwo"
