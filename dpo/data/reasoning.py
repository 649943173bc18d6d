"""Problems of the generators of `reasoning-gym` (extra `reasoning`), with answers that the generator scores.

The generator makes item i with its seed + i, so two seeds that are close share most items. The seeds of this
module are multiples of `DISTANCE`, which is more than the number of problems.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from dpo.common.errors import InputError
from dpo.data.settings import DISTANCE, DataSettings, ReasoningProblems

PREFIX = "reasoning_gym:"
ANSWER = "Answer: {}"
BLOCKS = 2**31 // DISTANCE


def reasoning_problems(params: DataSettings, seed: int) -> ReasoningProblems | None:
    """Return the problems of `data.source: reasoning_gym:NAME`, or None if the source is another one."""
    if not isinstance(params.source, str) or not params.source.startswith(PREFIX):
        return None
    name = params.source.removeprefix(PREFIX)
    return ReasoningProblems(generator=name, seed=seed, **vars(params.reasoning))


class Generator:
    """Problems by their question. Questions that occur twice, or whose own answer is not right, are left out."""

    def __init__(self, problems: ReasoningProblems, key: str) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise InputError(
                f"params.yaml: {key}: {PREFIX}{problems.generator} needs the package reasoning-gym ({error}); run "
                "`pip install 'reasoning-gym>=0.1.25'`, which needs a C compiler, or use another source"
            ) from error
        start = problems.seed % BLOCKS * DISTANCE
        try:
            self._data = reasoning_gym.create_dataset(
                problems.generator, seed=start, size=problems.problems, **problems.difficulty
            )
        except (AssertionError, TypeError, ValueError) as error:
            fix = "correct the name, or `difficulty`"
            raise InputError(f"params.yaml: {key}: {PREFIX}{problems.generator}: {error}; {fix}") from error
        self.entries: dict[str, Mapping[str, Any]] = {}
        for entry in self._data:
            question, answer = entry["question"].strip(), entry["answer"]
            if question not in self.entries and answer is not None and self.is_right(answer, entry):
                self.entries[question] = entry
        if not self.entries:
            raise InputError(
                f"params.yaml: {key}: {PREFIX}{problems.generator} has no problem whose own answer it scores 1; "
                "use another generator"
            )

    def is_right(self, answer: str, entry: Mapping[str, Any]) -> bool:
        """Return whether the generator scores an answer exactly 1. Lower scores are for parts of an answer."""
        return bool(self._data.score_answer(answer=answer, entry=entry) == 1.0)


def reasoning_rows(problems: ReasoningProblems, eval_fraction: float, key: str) -> Iterator[dict[str, Any]]:
    """Yield problems as preference pairs: the right answer as `chosen`, that of another problem as `rejected`.

    A problem for which no other problem has a wrong answer is left out. A hash of the question decides the split.
    """
    generator = Generator(problems, key)
    entries = list(generator.entries.items())
    for number, (question, entry) in enumerate(entries):
        others = (entries[(number + step) % len(entries)][1]["answer"] for step in range(1, len(entries)))
        wrong = next((answer for answer in others if not generator.is_right(answer, entry)), None)
        if wrong is None:
            continue
        digest = hashlib.sha256(question.encode()).hexdigest()
        yield {
            "id": f"{problems.generator}-{digest[:16]}",
            "prompt": question,
            "chosen": ANSWER.format(entry["answer"]),
            "rejected": ANSWER.format(wrong),
            "split": "eval" if int(digest[:8], 16) < eval_fraction * 2**32 else "train",
            "source": f"{PREFIX}{problems.generator}",
        }


def stated_answer(response: str) -> str | None:
    """Return what follows the last `Answer: ` at the start of a line, or None."""
    _, mark, answer = f"\n{response}".rpartition("\nAnswer: ")
    return answer.strip() if mark else None
