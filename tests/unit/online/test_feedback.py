"""Each kind of feedback scores the answers to prompts, from which pairs are made."""

import json
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from dpo.data.arithmetic import work
from dpo.evaluation.judges import load_judge
from dpo.evaluation.settings import LlmSettings, RewardModelSettings, ScorerSettings, VerifierSettings
from dpo.online.pairs import score_responses
from tests.support.models import TINY, chat_tokenizer
from tests.support.openai_server import FakeServer

PROMPTS = ["Work out 6 + 8 + 2 step by step."] * 3 + ["Work out 1 + 1 + 1 step by step."] * 3
RIGHT, OTHER = "\n".join(work([6, "+", 8, "+", 2])), "\n".join(work([1, "+", 1, "+", 1]))
ANSWERS = [RIGHT, "Answer: 17", OTHER, RIGHT, OTHER, "2 + 1 = 3\nAnswer: 3"]


def scores(settings):
    return score_responses(load_judge(settings, "feedback"), PROMPTS, ANSWERS, 3)


def test_a_verifier_scores_right_answers():
    assert scores(VerifierSettings(kind="verifier")) == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def lengths(prompts, responses):
    """Score long responses higher."""
    return [float(len(response)) for response in responses]


def test_a_scorer_scores_by_its_function():
    function = f"{__name__}:lengths"
    assert scores(ScorerSettings(kind="scorer", function=function)) == [float(len(answer)) for answer in ANSWERS]


def prefer_the_longer(body):
    """Reply with the verdict of a judge that prefers the longer of the two answers in the request."""
    question = body["messages"][-1]["content"]
    first, second = (
        re.search(rf"<response-{x}-(\w+)>\n(.*?)\n</response-{x}-\1>", question, re.DOTALL)[2] for x in "AB"
    )
    verdict = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "TIE"
    choice = {"index": 0, "message": {"role": "assistant", "content": verdict}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]})


def test_a_language_model_ranks_by_its_mean_verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    free = {"input_price": 0.0, "output_price": 0.0, "max_cost": 1.0}
    with FakeServer(prefer_the_longer).running() as server:
        found = scores(
            LlmSettings(kind="llm", model="m", base_url=server.url, criterion="Length.", parallel=2, **free)
        )
    assert found == [1.0, 0.0, 0.5, 1.0, 0.5, 0.0]


def test_a_reward_model_scores_by_its_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    extra = {"num_labels": 1, "max_position_embeddings": 300, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model("llama", **{**TINY, **extra, "pad_token_id": tokenizer.pad_token_id})
    Path("models/own").mkdir(parents=True)
    for folder in ("models/own/rm", "models/rewards/17"):
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = scores(RewardModelSettings(kind="reward_model", model=folder))
        assert len(found) == len(set(found)) == 6
