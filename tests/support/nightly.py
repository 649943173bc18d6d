"""Kill nightly runs and rollbacks at random moments: `python -m tests.support.nightly`, a part of `make faults`.

Every fourth case is a rollback, the others are retrainings. The next run has to reach the state of an undisturbed
one: data, weights, metrics, commits and champion. Each case writes a file with its seed, its moment and its result
to `benchmarks/results/nightly-faults/`. A second call runs only the cases without a file of the same code.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from dpo.common.files import write_json
from tests.support.models import chat_tokenizer, make_model
from tests.support.prefect_server import prefect_server
from tests.support.project import ENV, ROOT, book_pairs, change, make_project
from tests.support.results import result_hashes

FOLDER = ROOT / "benchmarks/results/nightly-faults"
CASES = 40
CORES = os.cpu_count() or 1
ALL = "the flow and its stages"
LIMIT_SECONDS = 1800
"""After which a run counts as hung, also on a busy machine."""
RESULT_FILES = (
    "data/**/*.jsonl", "data/*.parquet", "models/*/*.safetensors", "tokens/*/*", "reference/*/*", "samples/*",
    "margins/*", "metrics/**/*.*",
)  # fmt: skip
JUDGE = """
import itertools, sys
calls = itertools.count()

def newest(prompts, answers):
    '''The policy wins: over the reference, and at the gate, where it is scored first.'''
    wins = sys.argv[0].endswith("evaluate.py") or (sys.argv[-1] == "promote" and next(calls) % 2 == 0)
    return [float(wins)] * len(answers)
"""
LENIENT = {
    "max_displacement": 1e3, "max_perplexity_ratio": 1e3, "max_length_ratio": 1e3, "min_distinct_ratio": 0.0,
    "max_repetition_rise": 1.0, "max_empty": 1.0, "max_unfinished_rise": 1.0, "max_loss_rise": 1e3,
}  # fmt: skip


@dataclass
class Nights:
    """A folder with a project, its landing folder and its DVC remote, and what undisturbed runs make of them."""

    place: Path
    url: str
    """Of Prefect's server."""
    seconds: dict[str, float] = field(default_factory=dict)
    expected: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def project(self) -> Path:
        """The project. Cases use this folder one after the other."""
        return self.place / "night/project"

    def command(self, operation: str) -> list[str]:
        """Return the command of an operation."""
        landing = [str(self.place / "night/landing")] if operation == "retrain" else []
        return [sys.executable, "-m", f"flows.{operation}", *landing]

    def start(self, operation: str, log: Path) -> subprocess.Popen[bytes]:
        """Start an operation in the background."""
        names = {f"GIT_{role}_{key}": "t@e" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        env = {**ENV, **names, "PREFECT_API_URL": self.url}
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(operation),
                cwd=self.project,
                env=env,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def run(self, operation: str) -> str:
        """Run an operation and return its log. Assert that it succeeds."""
        log = self.place / f"{operation}.log"
        log.unlink(missing_ok=True)
        code = self.start(operation, log).wait(LIMIT_SECONDS)
        assert code == 0, f"exit code {code}: {log.read_text(errors='replace')[-3000:]}"
        return log.read_text(errors="replace")

    def land(self, name: str, first: int) -> None:
        """Put a file of eight pairs into the landing folder."""
        table: pd.DataFrame = book_pairs(first, 8)
        table.to_json(self.place / "night/landing" / f"{name}.jsonl", orient="records", lines=True)

    def reset(self, source: str) -> None:
        """Restore a copy of the folder that `keep` made."""
        shutil.rmtree(self.place / "night", ignore_errors=True)
        shutil.copytree(self.place / source, self.place / "night", symlinks=True)

    def keep(self, name: str) -> None:
        """Keep a copy of the folder."""
        shutil.copytree(self.place / "night", self.place / name, symlinks=True)

    def git(self, *words: str) -> str:
        """Return the output of git."""
        done = subprocess.run(["git", *words], cwd=self.project, capture_output=True, text=True, check=True)
        return done.stdout

    def champion(self) -> dict[str, int]:
        """Return the aliases of the registered model."""
        with closing(sqlite3.connect(self.project / "mlflow.db")) as store:  # MLflow keeps files open
            return dict(store.execute("SELECT alias, version FROM registered_model_aliases").fetchall())

    def state(self) -> dict[str, Any]:
        """Return everything that has to be as after an undisturbed run."""
        status = subprocess.run(["dvc", "status"], cwd=self.project, env=ENV, capture_output=True, text=True)
        return {
            "files": result_hashes(self.project, RESULT_FILES),
            "commits": self.git("log", "--format=%B").split("\n\n"),
            "uncommitted": self.git("status", "--porcelain"),
            "dvc": status.stdout,
            "champion": self.champion(),
            "refused": sorted(path.name for path in (self.project / ".retrain/refused").glob("*")),
            "unfinished": [name for name in (".retrain/journal.json",) if (self.project / name).exists()],
        }


@contextmanager
def nights() -> Iterator[Nights]:
    """Make a project with two champions and a new file, and record undisturbed runs."""
    with tempfile.TemporaryDirectory() as name, prefect_server(Path(name) / "prefect") as url:
        made = Nights(Path(name), url)
        prepare(made)
        made.keep("before")
        for operation in ("retrain", "rollback"):
            made.reset("before")
            start = time.monotonic()
            made.run(operation)
            made.seconds[operation] = time.monotonic() - start
            made.expected[operation] = made.state()
        yield made


def prepare(made: Nights) -> None:
    """Make the project and promote versions 1 and 2."""
    tokenizer = chat_tokenizer()
    model = make_model(
        "llama", made.place / "model", vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tokenizer.save_pretrained(model)
    for folder in ("landing", "store", "project"):
        (made.place / "night" / folder).mkdir(parents=True)
    make_project(made.project, model)
    (made.project / "functions/judges/newest.py").write_text(JUDGE)
    values = {
        "data.source": ["data/own/pairs.jsonl", "data/own/landed"],
        "evaluate.judges": [{"kind": "scorer", "function": "functions.judges.newest:newest"}],
        "compare.max_kl": 1e3,
        "run.checkpoint_minutes": 0,
    }
    change(made.project, values | {f"compare.guardrails.{name}": value for name, value in LENIENT.items()})
    remote = ["dvc", "remote", "add", "--quiet", "--default", "--local", "store", str(made.place / "night/store")]
    subprocess.run(remote, cwd=made.project, env=ENV, check=True)
    made.git("add", "-A")
    made.git("-c", "user.name=t", "-c", "user.email=t@e", "commit", "-qm", "settings")
    for number, day in enumerate(("monday", "tuesday")):
        made.land(day, 100 * (number + 1))
        made.run("retrain")
        assert made.champion()["champion"] == number + 1
    made.land("wednesday", 300)


def one_case(made: Nights, number: int, seed: int) -> dict[str, Any]:
    """Kill one run at a random moment and let the next one recover. Return the facts and whether it survived."""
    draw = random.Random(f"{seed} {number}")
    operation = "rollback" if number % 4 == 3 else "retrain"
    moment = draw.uniform(0, made.seconds[operation])
    victims = draw.choice([ALL, "the flow only"])
    made.reset("before")
    log = made.place / "killed.log"
    log.unlink(missing_ok=True)
    process = made.start(operation, log)
    time.sleep(moment)
    flow = psutil.Process(process.pid)  # perhaps ended, but not waited for
    for each in [flow, *(flow.children(recursive=True) if victims == ALL else [])]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    lines = log.read_text(errors="replace").splitlines()
    case = {
        "case": number, "seed": seed, "operation": operation, "moment_s": round(moment, 2), "killed": victims,
        "last_line": lines[-1][-120:] if lines else "", "code": code_hash(),
    }  # fmt: skip
    try:
        journal = (made.project / ".retrain/journal.json").exists()
        if operation == "retrain" or journal or made.champion() != made.expected["rollback"]["champion"]:
            made.run(operation)
        found, expected = made.state(), made.expected[operation]
        differing = [name for name in expected if found[name] != expected[name]]
        if "files" in differing:
            differing += sorted(dict(found["files"].items() ^ expected["files"].items()))
        return case | {"survived": not differing, "differing": differing}
    except (AssertionError, subprocess.SubprocessError) as error:
        return case | {"survived": False, "error": str(error)[-2000:]}


def code_hash() -> str:
    """Return a hash of the code that a case runs; results of other code are not reused."""
    files = [path for folder in ("dpo", "tasks", "flows") for path in (ROOT / folder).rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted([*files, Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def results(folder: Path, seed: int) -> dict[int, dict[str, Any]]:
    """Return the results of a seed and of this code by the number of the case."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("case-*.json"))]
    return {each["case"]: each for each in found if (each["seed"], each["code"]) == (seed, code_hash())}


def run_cases(numbers: list[int], seed: int, folder: Path) -> None:
    """Run cases one after the other in a project of their own, and write the result of each."""
    with nights() as made:
        for number in numbers:
            start = time.monotonic()
            case = one_case(made, number, seed) | {"seconds": round(time.monotonic() - start, 1)}
            write_json(folder / f"case-{number:02}.json", case)
            print(json.dumps(case), flush=True)


def run(seed: int, cases: int = CASES, folder: Path = FOLDER) -> list[dict[str, object]]:
    """Run the cases that have no result; return a row for each operation, as `make faults` writes it.

    Each processor core has a project and runs its share of the cases.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = sorted(set(range(cases)) - set(results(folder, seed)))
    parts = [part for core in range(CORES) if (part := missing[core::CORES])]
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(partial(run_cases, seed=seed, folder=folder), parts))
    rows = []
    for operation, title in (("retrain", "nightly run killed"), ("rollback", "rollback killed")):
        done = [case for case in results(folder, seed).values() if case["operation"] == operation]
        survived = sum(case["survived"] for case in done)
        rows.append(
            {"fault": title, "tried": len(done), "survived": survived, "lost": "the current step or stage"}
        )
    return rows


def main() -> None:
    """Run the cases. Exit with 1 if the project did not recover from one."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.nightly", description=__doc__)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--cases", type=int, default=CASES)
    arguments = parser.parse_args()
    rows = run(arguments.seed, arguments.cases)
    for row in rows:
        print(f"{row['fault']}: {row['survived']} of {row['tried']} survived")
    sys.exit(any(row["survived"] != row["tried"] for row in rows))


if __name__ == "__main__":
    main()
