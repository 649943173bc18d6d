"""Judges with default settings, and a server that judges by length."""

import json
import re

from dpo.evaluation.judges import load_judges
from dpo.evaluation.settings import LlmSettings
from tests.support.openai_server import FakeServer


def load_judge(settings):
    (judge,) = load_judges([settings])
    return judge


def wins(judge, *texts):
    return judge.compare(*texts)["win"].tolist()


TURNS = [
    {"role": "user", "content": "Say something about film 12."},
    {"role": "assistant", "content": "Film 12 is a bore."},
    {"role": "user", "content": "And film 3?"},
]


def texts_in(question):
    """Return the two responses in a question."""
    return [re.search(rf"<response-{x}-(\w+)>\n(.*?)\n</response-{x}-\1>", question, re.DOTALL)[2] for x in "AB"]


def longer(question):
    """Return the verdict of a judge that prefers the longer response."""
    first, second = map(len, texts_in(question))
    return "A" if first > second else "B" if second > first else "TIE"


def completion(text, usage=None, finish_reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    body = {"object": "chat.completion", "choices": [choice]}
    return 200, {}, json.dumps(body if usage is None else {**body, "usage": usage})


FREE = {"input_price": 0.0, "output_price": 0.0, "max_cost": 1.0}


class ChatServer(FakeServer):
    """A chat completions server. A test may replace its `respond(question)`."""

    def __init__(self):
        super().__init__(lambda body: self.respond(body["messages"][-1]["content"]))
        self.respond = lambda question: completion(longer(question))

    def judge(self, **changes):
        settings = {"criterion": "Length.", "parallel": 4, **FREE, **changes}
        return load_judge(LlmSettings(kind="llm", model="some-model", base_url=self.url, **settings))

    def questions(self):
        """Return the questions since the last call."""
        questions = [request.body["messages"][-1]["content"] for request in self.requests]
        self.requests.clear()
        return questions


PAIRS = (
    ["film 1", TURNS, "film 3"],
    ["a long response", "short", "middling"],
    ["brief", "a longer one", "the same!"],
)
LONGER = [1.0, 0.0, 0.0]
