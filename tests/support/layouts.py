"""A question with two answers, and its conversion from several layouts."""

from dpo.data.formats import Spelling, convert

ASK, GOOD, BAD = "How do rivers move?", "They follow the slope.", "No idea."
USER = {"role": "user", "content": ASK}
ANSWER, OTHER = {"role": "assistant", "content": GOOD}, {"role": "assistant", "content": BAD}
PLAIN = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}


def sharegpt(turn):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"from": names[turn["role"]], "value": turn["content"]}


def one(row, **spelling):
    (pair,) = convert(row, Spelling(**spelling), "pairs").pairs
    return pair
