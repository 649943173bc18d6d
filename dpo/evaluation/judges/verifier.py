"""A judge that checks answers: a response is right if its last line is exactly `Answer: ` and the answer.

With a generator of reasoning-gym, it is right if the generator scores what follows the last `Answer: ` exactly 1.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dpo.common.errors import InputError
from dpo.data.arithmetic import is_right, read_problem, work, work_is_right
from dpo.data.reasoning import Generator, stated_answer
from dpo.engine.chat import Prompt, turns_of
from dpo.evaluation.settings import VerifierSettings

OWN_DATA = Path("data/own")


class Verifier:
    """Scores 1 or 0. The answers come from a table, or from the prompts of `data.source: arithmetic`."""

    def __init__(self, settings: VerifierSettings, key: str) -> None:
        self.name = settings.name
        self.where = f"params.yaml: {key}"
        self.problems = settings.problems
        self.answers = None if settings.answers is None else _read_answers(settings.answers, self.where)

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        """Return 1.0 for each right response and 0.0 for each other one.

        Raises:
            InputError: the answer to a prompt is unknown.
        """
        pairs = zip(prompts, responses, strict=True)
        if self.problems is not None:
            return [float(self._solves(prompt, response)) for prompt, response in pairs]
        return [float(is_right(self._answer(prompt), response)) for prompt, response in pairs]

    def compare(
        self, prompts: list[Prompt], responses: list[str], others: list[str], other_scores: ArrayLike | None = None
    ) -> pd.DataFrame:
        """Compare by score; see `dpo.evaluation.judges.Judge.compare`.

        Returns:
            Also `right_work`, 1.0 if every line of the response's work is true and leads to its answer, else 0.0;
            NaN if the prompt is not one of `data.source: arithmetic`.
        """
        scores = self.score(prompts, responses)
        other_scores = self.score(prompts, others) if other_scores is None else other_scores
        win = (np.sign(np.subtract(scores, other_scores)) + 1) / 2
        problems = [read_problem(_text(prompt)) for prompt in prompts]
        right_work = [
            np.nan if problem is None else float(work_is_right(problem, response))
            for problem, response in zip(problems, responses, strict=True)
        ]
        return pd.DataFrame(
            {"win": win, "score": scores, "other_score": np.asarray(other_scores), "right_work": right_work}
        )

    @functools.cached_property
    def _generator(self) -> Generator:
        assert self.problems is not None
        return Generator(self.problems, self.where.removeprefix("params.yaml: "))

    def _solves(self, prompt: Prompt, response: str) -> bool:
        """Return whether the generator of the problem scores the stated answer exactly 1."""
        text, answer = _text(prompt), stated_answer(response)
        if text not in self._generator.entries:
            raise InputError(
                f"{self.where}: no problem with the prompt {text[:80]!r}; leave `problems` out, so that they are "
                "those of data.source"
            )
        return answer is not None and self._generator.is_right(answer, self._generator.entries[text])

    def _answer(self, prompt: Prompt) -> str:
        text = _text(prompt)
        if self.answers is not None:
            if text not in self.answers:
                raise InputError(f"{self.where}.answers: no answer to the prompt {text[:80]!r}; add a row")
            return self.answers[text]
        problem = read_problem(text)
        if problem is None:
            raise InputError(
                f"{self.where}: cannot compute the answer to the prompt {text[:80]!r}; use data.source: "
                "arithmetic, or name a table of answers in `answers`"
            )
        return work(problem)[-1].removeprefix("Answer: ")


def _text(prompt: Prompt) -> str:
    """Return the text of the last turn."""
    return str(turns_of(prompt)[-1]["content"]).strip()


def _read_answers(name: str, where: str) -> dict[str, str]:
    """Return the answers of a table by prompt."""
    path = Path(name)
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": pd.read_parquet,
        ".jsonl": lambda file: pd.read_json(file, lines=True, dtype=False),
    }
    if OWN_DATA.absolute() not in path.absolute().parents or ".." in path.parts or path.suffix not in readers:
        fix = f"move it to {OWN_DATA / path.name}"
        raise InputError(f"{where}.answers: {name} is not a .parquet or .jsonl file under {OWN_DATA}/; {fix}")
    try:
        table = readers[path.suffix](path)
        prompts, answers = table["prompt"], table["answer"]
    except (OSError, ValueError, KeyError) as error:
        fault = f"cannot be read: {error}; it needs the columns `prompt` and `answer`"
        raise InputError(f"{where}.answers: {name} {fault}") from error
    if empty := int((prompts.isna() | answers.isna()).sum()):
        raise InputError(f"{where}.answers: {name}: {empty} rows have no prompt or no answer; fill or remove them")
    texts = prompts.astype(str).str.strip()
    known = dict(zip(texts, answers.astype(str).str.strip(), strict=True))
    if len(known) < len(set(zip(texts, answers.astype(str).str.strip(), strict=True))):
        raise InputError(f"{where}.answers: {name}: a prompt has two answers; keep one")
    return known
