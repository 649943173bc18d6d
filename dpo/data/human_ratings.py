"""The default preference data: pairs of sentences with human ratings.

Hutto and Gilbert 2014 ("VADER", ICWSM) had 15 to 20 people rate each sentence of film reviews, product reviews
and newspaper editorials from -4 (negative) to 4 (positive). Of two sentences of a domain, `chosen` has the higher
mean rating.
"""

import ast
import io
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

DOMAINS = {
    "movieReviewSnippets": "film review",
    "amazonReviewSnippets": "product review",
    "nytEditorialSnippets": "newspaper editorial",
}

TRAIN_PHRASINGS = (
    "Write one sentence from a {}.",
    "Give me a sentence of a {}.",
    "Quote a line from a {}.",
    "Compose a sentence for a {}.",
    "What might a {} say?",
    "Please write a line of a {}.",
    "I need a sentence for a {}.",
    "Can you write a single sentence of a {}?",
    "Produce one line of a {}.",
    "Draft a sentence that could stand in a {}.",
    "Say something that belongs in a {}.",
    "Write a sentence as it might appear in a {}.",
)
EVAL_PHRASINGS = (
    "Make up a sentence from a {}.",
    "Show me one line of a {}.",
    "Write a short excerpt from a {}.",
    "Invent a line of a {}.",
    "Could you give me one sentence of a {}?",
    "Let me read a sentence of a {}.",
    "Come up with a line for a {}.",
    "What would one sentence of a {} be?",
    "Think of a sentence in a {}.",
    "Imagine a {} and write one of its sentences.",
    "One line of a {}, please.",
    "Put down a sentence of a {}.",
)
"""Phrasings of the eval split, so that no prompt is in both splits."""

WORDS = range(4, 21)
"""Number of words of the sentences in use: enough to judge a sentence, and fast on two CPU cores."""


@dataclass(frozen=True)
class Rated:
    """A sentence and its ratings. `mean` is the mean that the authors published."""

    id: str
    text: str
    mean: float
    ratings: tuple[int, ...]


def agreement(chosen: tuple[int, ...], rejected: tuple[int, ...]) -> float:
    """Return the probability that a rater of `chosen` rated higher than a rater of `rejected`; ties count 1/2.

    Its mean over pairs is the accuracy with which one person predicts another: the human ceiling.
    """
    difference = np.subtract.outer(chosen, rejected)
    return float(np.mean(difference > 0) + np.mean(difference == 0) / 2)


def read_ratings(sdist: Path) -> dict[str, list[Rated]]:
    """Return rated sentences by domain, from the source distribution of vaderSentiment.

    Repeated texts are skipped, and so are sentences with different means in the two files.
    """
    with tarfile.open(sdist) as outer:
        content = _read(outer, next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz")))
    seen: set[str] = set()
    domains: dict[str, list[Rated]] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for prefix, domain in DOMAINS.items():
            raters = {row[0]: row for row in _rows(archive, f"{prefix}_anonDataRatings.txt")}
            domains[domain] = []
            for key, mean, text in _rows(archive, f"{prefix}_GroundTruth.txt"):
                _, raters_mean, _, ratings = raters[key]
                text = " ".join(text.split())
                if text.casefold() in seen or abs(float(mean) - float(raters_mean)) > 1e-3:
                    continue
                seen.add(text.casefold())
                rated = Rated(f"{prefix}/{key}", text, float(mean), tuple(ast.literal_eval(ratings)))
                domains[domain].append(rated)
    return domains


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def _rows(archive: tarfile.TarFile, name: str) -> list[list[str]]:
    text = _read(archive, f"hutto_ICWSM_2014/{name}").decode("utf-8-sig")
    return [line.split("\t") for line in text.split("\r\n") if line.strip()]


def rating_pairs(
    domains: dict[str, list[Rated]], *, min_rating_gap: float, eval_fraction: float, seed: int
) -> pd.DataFrame:
    """Pair the sentences of each domain at random. Each sentence is used at most once.

    Ties, and pairs whose mean ratings differ by less than `min_rating_gap`, are skipped. The share `eval_fraction`
    of the pairs is held out, with different prompts. `seed` sets partners, phrasings and split. The result has one
    row per pair, sorted by id, with fields of `dpo.data.schema.Pairs`.
    """
    rng = random.Random(seed)
    rows = []
    for domain, sentences in domains.items():
        usable = [s for s in sentences if len(s.text.split()) in WORDS]
        rng.shuffle(usable)
        for first, second in zip(usable[::2], usable[1::2], strict=False):
            better, worse = (first, second) if first.mean > second.mean else (second, first)
            if better.mean - worse.mean < max(min_rating_gap, 1e-9):
                continue
            split = "eval" if rng.random() < eval_fraction else "train"
            phrasing = rng.choice(EVAL_PHRASINGS if split == "eval" else TRAIN_PHRASINGS)
            rows.append(
                {
                    "id": f"{better.id}>{worse.id.split('/')[1]}",
                    "prompt": phrasing.format(domain),
                    "chosen": better.text,
                    "rejected": worse.text,
                    "split": split,
                    "source": domain,
                    "agreement": agreement(better.ratings, worse.ratings),
                    "chosen_rating": better.mean,
                    "rejected_rating": worse.mean,
                }
            )
    return pd.DataFrame(rows).sort_values("id", ignore_index=True)
