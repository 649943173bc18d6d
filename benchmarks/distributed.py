"""Compare the time of a sweep on two workers with one: `python -m benchmarks.distributed`.

A head, two clones with a worker each, a Prefect server and an S3 server run on this machine. Every process has one
thread. A sweep of four trials of a small random model is timed with one worker, and another of four with two.
Writes `benchmarks/results/distributed.json` and the table of `docs/operations/distributed.md`. Needs two idle
cores; takes twenty minutes.
"""

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.page import put_table
from dpo.common.files import write_json
from tests.support.machines import S3_ENV, Machines, add_s3_remote, s3_server
from tests.support.models import chat_tokenizer, make_model
from tests.support.project import change, make_project

RESULTS, PAGE = Path("benchmarks/results/distributed.json"), Path("docs/operations/distributed.md")
TARGET = 0.65
WARM_UP, SWEEPS = [0.1, 0.2], {"one": [0.11, 0.12, 0.13, 0.14], "two": [0.21, 0.22, 0.23, 0.24]}
"""Betas of the trials, by the last worker that runs them. The first sweep also prepares data and reference."""
SETTINGS = {
    "sweep.learning_rates": [1e-4],
    "dpo.epochs": 50,
    "evaluate.kl_samples": 8,
}
SIZE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "max_position_embeddings": 512}


def make_small_model(folder: Path) -> Path:
    """Save a random model with a tokenizer, of which a trial takes about a minute."""
    tokenizer = chat_tokenizer()
    make_model(
        "llama", folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **SIZE,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def make_machines(place: Path, port: int) -> Machines:
    """Return a head with two clones, without workers."""

    def fill(head: Path) -> None:
        make_project(head, make_small_model(place / "model"))
        change(head, {**SETTINGS, "sweep.betas": WARM_UP})

    return Machines(
        place / "machines", fill, partial(add_s3_remote, port=port), OMP_NUM_THREADS="1", **S3_ENV
    )  # fmt: skip


def timed(machines: Machines, betas: list[float]) -> float:
    """Return the seconds of a sweep over betas that are new to all machines."""
    change(machines.head, {"sweep.betas": betas})
    start = time.monotonic()
    machines.sweep()
    return time.monotonic() - start


def measure(place: Path) -> dict[str, Any]:
    """Return the seconds of a sweep with one worker and with two, and their ratio."""
    (place / "machines").mkdir()
    with s3_server("results") as line:
        machines = make_machines(place, line.port)
        try:
            for name in ("one", "two"):
                machines.start_worker(name)
            timed(machines, WARM_UP)
            machines.kill_worker("two")
            seconds = {"one": timed(machines, SWEEPS["one"])}
            machines.start_worker("two")
            seconds["two"] = timed(machines, SWEEPS["two"])
        finally:
            machines.close()
    return {"seconds": seconds, "ratio": seconds["two"] / seconds["one"], "target": TARGET, "cpus": os.cpu_count()}


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    seconds = results["seconds"]
    rows = ["| four trials with | seconds |", "| --- | ---: |"]
    rows += [f"| one worker | {seconds['one']:.0f} |", f"| two workers | {seconds['two']:.0f} |"]
    return "\n".join([*rows, f"| ratio, target at most {TARGET} | {results['ratio']:.2f} |"])


def main() -> None:
    """Measure and write the results."""
    with tempfile.TemporaryDirectory() as place:
        results = measure(Path(place))
    write_json(RESULTS, results)
    put_table(PAGE, "distributed", table(results))
    print(table(results))  # noqa: T201


if __name__ == "__main__":
    main()
