"""Chains of numbers that are worked step by step: problems with a verifiable answer.

A problem has the prompt `Work out 6 + 8 + 2 step by step.` and the solution `6 + 8 = 14`, `14 + 2 = 16`,
`Answer: 16`, one line each. The rejected solution of a pair has an error in one step and carries it on.
"""

import hashlib
import operator
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dpo.common.errors import InputError
from dpo.data.settings import ArithmeticSettings

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
PROMPT = "Work out {} step by step."
PROBLEM = re.compile(r"Work out (\d{1,40}(?: [-+*] \d{1,40})+) step by step\.", re.ASCII)
LINE = re.compile(r"(-?\d{1,40}) ([-+*]) (-?\d{1,40}) = (-?\d{1,40})", re.ASCII)
ANSWER = "Answer: {}"
ERRORS = (-10, -2, -1, 1, 2, 10)  # added to the result of the wrong step

Problem = Sequence[Any]
"""Numbers with operators between them: `[6, "+", 8, "+", 2]`."""


def arithmetic_rows(settings: ArithmeticSettings, eval_fraction: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield distinct problems as preference pairs: prompt, right work as `chosen`, wrong work as `rejected`.

    A hash of the problem decides its split. Problems that differ only in the order of what they add, as 2 + 3 - 1
    and 3 + 2 - 1, have the same hash.

    Raises:
        InputError: there are fewer distinct problems than `settings.problems`.
    """
    choices, signs, terms = 10**settings.digits, settings.operators, settings.terms
    total = choices**terms * len(signs) ** (terms - 1)
    if settings.problems > total:
        raise InputError(
            f"params.yaml: data.arithmetic.problems: {settings.problems}, but there are only {total} problems of "
            f"{terms} terms with {settings.digits} digits; lower it, or raise terms or digits"
        )
    rng = random.Random(seed)
    drawn: dict[tuple[Any, ...], None] = {}
    while len(drawn) < settings.problems:
        parts: list[Any] = [rng.randrange(choices)]
        for _ in range(terms - 1):
            parts += [rng.choice(signs), rng.randrange(choices)]
        drawn[tuple(parts)] = None
    for problem in drawn:
        text = " ".join(map(str, problem))
        digest = hashlib.sha256(repr(_unordered(problem)).encode()).hexdigest()
        yield {
            "id": text.replace(" ", ""),
            "prompt": PROMPT.format(text),
            "chosen": "\n".join(work(problem)),
            "rejected": "\n".join(_wrong_work(problem, rng)),
            "split": "eval" if int(digest[:8], 16) < eval_fraction * 2**32 else "train",
            "source": "arithmetic",
        }


def work(problem: Problem, wrong_step: int = -1, error: int = 0) -> list[str]:
    """Return the lines of a solution. Products come first, then sums and differences, each from left to right.

    `error` is added to the result of step `wrong_step`, counted from 0, and later steps use that result.
    """
    parts, lines = list(problem), list[str]()
    while len(parts) > 1:
        place = parts.index("*") if "*" in parts else 1
        left, sign, right = parts[place - 1 : place + 2]
        result = OPERATORS[sign](left, right) + error * (len(lines) == wrong_step)
        lines.append(f"{left} {sign} {right} = {result}")
        parts[place - 1 : place + 2] = [result]
    return [*lines, ANSWER.format(parts[0])]


def read_problem(text: str) -> list[Any] | None:
    """Return the problem of a prompt, or None if the text is not such a prompt."""
    match = PROBLEM.fullmatch(text.strip())
    if match is None:
        return None
    return [part if part in OPERATORS else int(part) for part in match[1].split()]


def is_right(answer: str, response: str) -> bool:
    """Return whether the last line of a response is exactly `Answer: ` and the answer."""
    return _lines(response)[-1] == ANSWER.format(answer)


def work_is_right(problem: Problem, response: str) -> bool:
    """Return whether the work above the last line has one true equation per operator and leads to the answer.

    An equation is `a + b = c`, also with - or *. Its numbers are of the problem, or results of earlier equations,
    each used once. The result of the last one must be the stated answer.
    """
    *lines, stated = _lines(response)
    equations = [LINE.fullmatch(line) for line in lines]
    if len(lines) != len(problem) // 2 or not all(equations):
        return False
    found = [each.groups() for each in equations if each]
    unused = Counter(part for part in problem if part not in OPERATORS)
    for a, sign, b, result in found:
        unused.subtract([int(a), int(b)])
        if OPERATORS[sign](int(a), int(b)) != int(result) or min(unused.values()) < 0:
            return False
        unused[int(result)] += 1
    return stated == ANSWER.format(int(found[-1][3]))


def _lines(response: str) -> list[str]:
    return response.removesuffix("\n").split("\n")


def _wrong_work(problem: Problem, rng: random.Random) -> list[str]:
    """Return work with an error in a random step, or in the last one if a product with 0 hides it."""
    right, steps = work(problem), len(problem) // 2
    error = rng.choice(ERRORS)
    wrong = work(problem, rng.randrange(steps), error)
    return wrong if wrong[-1] != right[-1] else work(problem, steps - 1, error)


def _unordered(problem: Problem) -> list[Any]:
    """Return the sorted parts of a problem: each product, as sorted factors, with its sign."""
    parts, sign, factors = [], "+", [problem[0]]
    for mark, value in zip(problem[1::2], problem[2::2], strict=True):
        if mark == "*":
            factors.append(value)
        else:
            parts.append((sign, sorted(factors)))
            sign, factors = mark, [value]
    return sorted([*parts, (sign, sorted(factors))])
