"""Run the experiments of the plan: `python -m benchmarks.evidence`.

Cases that have a result with the same settings, engine and packages are skipped, so the work can be spread over
runs and machines. Each case runs in its own process and writes its result when it ends. A failed case is recorded,
counted and not repeated, unless `--again` is given.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.evidence import page
from benchmarks.evidence.plan import PLAN, RESULTS, Case, is_finished, load_cases, read_results, write_result
from benchmarks.evidence.schedule import run_all, seed_of
from dpo.common.errors import InputError, Stopped, TransientError

CACHE = Path(".evidence")


def run(options: argparse.Namespace) -> int:
    """Do what the options say; return 1 if cases are left.

    Raises:
        InputError: the plan is wrong, or no case has a name of `--cases`.
    """
    groups = load_cases(options.plan)
    selected = select(groups, options.cases)
    results = read_results(options.results)
    if options.list:
        for case in selected:
            say(f"{state(case, results):8} {case.name}")
        return 0
    left = [] if options.table else measure_all(selected, results, options)
    if (options.plan, options.results) == (PLAN, RESULTS):
        page.write()
    if left:
        say(f"{len(left)} cases left; run the same command again")
    return int(bool(left))


def select(groups: dict[str, list[Case]], names: list[str] | None) -> list[Case]:
    """Return the cases whose group, method or start of the name is listed, in the order of the plan."""
    wanted, found = set(names or groups), set[str]()
    selected: dict[str, Case] = {}
    for group, cases in groups.items():
        for case in cases:
            hits = {name for name in wanted if name in (group, case.method) or case.name.startswith(name)}
            found |= hits
            if hits:
                selected[case.name] = case
    if unknown := wanted - found:
        raise InputError(
            f"--cases: no group, method or case {', '.join(sorted(unknown))}; groups are {', '.join(groups)}, "
            "and --list prints the cases"
        )
    return list(selected.values())


def state(case: Case, results: dict[str, dict[str, Any]]) -> str:
    """Return `finished`, `failed`, or `not run`."""
    if not is_finished(case, results):
        return "not run"
    return "failed" if "error" in results[case.name] else "finished"


def measure_all(cases: list[Case], results: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[Case]:
    """Measure the cases without a result within the time limit, and return those that are left.

    Cases with a result of another engine or of other packages come last. Errors are those of `run_all`.
    """
    start = time.monotonic()
    left = [case for case in cases if options.again or not is_finished(case, results)]
    left.sort(key=lambda case: case.name in results)
    say(f"{len(cases) - len(left)} of {len(cases)} cases have a result")

    def may_start(case: Case, built: bool) -> bool:
        return time.monotonic() - start + expected(case, results, built) < 60 * options.minutes

    def record(case: Case, facts: dict[str, Any], built: float) -> None:
        if "error" not in facts:
            facts["seconds"] |= {"shared_products": built, "cases_at_once": options.jobs}
        write_result(case, facts, options.results)
        results.update(read_results(options.results))
        say(f"{case.name}: {describe(facts)}")

    run_all(left, options.cache, options.jobs, may_start, record)
    return left


def expected(case: Case, results: dict[str, dict[str, Any]], built: bool) -> float:
    """Return the longest time in seconds of a measured case of the same method, else of any case.

    If what the cases of its seed share is not built, the longest time of building it is added.
    """
    timed = [each for each in results.values() if "seconds" in each]
    same = [each for each in timed if (each["task"], each["method"]) == (case.task, case.method)]
    parts = ("training", "evaluation")
    longest = max((sum(each["seconds"][part] for part in parts) for each in same or timed), default=0)
    if built or seed_of(case) in {(each["task"], each["seed"]) for each in timed}:
        return longest
    return longest + max((each["seconds"]["shared_products"] for each in timed), default=0)


def describe(facts: dict[str, Any]) -> str:
    """Return the main figures of a result in one line."""
    if "error" in facts:
        return f"failed, {facts['error']}"
    values = {name: value for name, value in facts["metrics"].items() if name == "kl" or name.startswith("score/")}
    figures = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    seconds = facts["seconds"]["training"] + facts["seconds"]["evaluation"]
    return f"{figures}, {seconds:.0f} s, {facts['peak_memory_gib']:.1f} GiB"


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    line = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description="Run the experiments of the plan."
    )
    line.add_argument("--cases", nargs="+", help="groups, methods, or starts of names of cases; default: all")
    line.add_argument("--list", action="store_true", help="print the cases with their states")
    line.add_argument(
        "--minutes", type=float, default=60, help="time limit; a case starts only if it is likely to end in time"
    )
    line.add_argument("--jobs", type=int, default=1, help="cases at once")
    line.add_argument("--again", action="store_true", help="measure also cases that have a result or have failed")
    line.add_argument("--table", action="store_true", help="do not measure; write the page")
    line.add_argument("--plan", type=Path, default=PLAN)
    line.add_argument("--results", type=Path, default=RESULTS, help="only the default folder updates the page")
    line.add_argument("--cache", type=Path, default=CACHE, help="folder of models and data that cases share")
    return line


if __name__ == "__main__":
    try:
        sys.exit(run(parser().parse_args()))
    except (InputError, TransientError, Stopped) as error:
        sys.exit(str(error))
