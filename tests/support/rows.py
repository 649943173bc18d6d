"""Rows in several layouts, and their conversion."""

from dpo.data.formats import Spelling, convert

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Film 3?"}
WHY = {"role": "user", "content": "Why?"}
JOY = {"role": "assistant", "content": "A joy."}
BORE = {"role": "assistant", "content": "A bore."}
TEXTS = {"prompt": "Film 3?", "chosen": "A joy.", "rejected": "A bore."}
ULTRAFEEDBACK = {
    "instruction": "Film 3?",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "Fair.", "overall_score": 5.0},
        {"model": "b", "response": "A joy.", "overall_score": 9},
        {"model": "c", "response": "A bore.", "overall_score": "1.5"},
    ],
}
RATED = {"prompt": "Film 3?", "responses": ["Fair.", "A joy.", "A bore."], "scores": [0.5, 0.9, 0.1]}
RANKED = {"prompt": "Film 3?", "responses": ["Fair.", "A joy.", "A bore."], "ranks": [2, 1, 3]}


def pairs_of(row, pairing="best_worst", layout="pairs"):
    return convert(row, Spelling(pairing=pairing), layout).pairs


def turned(*turns):
    return {"chosen": [*turns, JOY], "rejected": [*turns, BORE]}


HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
