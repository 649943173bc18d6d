"""Measure the overhead of DVC and Prefect on stages that are up to date: `python -m benchmarks.orchestration`.

A chain of twenty stages, each of which copies a file, is brought up to date once. Then the check that nothing
changed is timed: with `dvc repro`, with the flow on a running Prefect server, and with the flow on a temporary
server. Writes `benchmarks/results/orchestration.json` and the table of `docs/operations/servers.md`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.page import put_table
from dpo.common.files import write_json
from flows.servers import is_healthy

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = Path("benchmarks/results/orchestration.json"), Path("docs/operations/servers.md")
STAGES, REPEATS = 20, 3
TARGETS = {"dvc_repro": 30.0, "flow_running_server": 30.0, "flow_own_server": 45.0}
"""Maximum seconds per method."""
LABELS = {
    "dvc_repro": "`dvc repro`",
    "flow_running_server": "`python -m flows.pipeline`, running Prefect server",
    "flow_own_server": "`python -m flows.pipeline`, temporary Prefect server",
}
REPRO = [sys.executable, "-m", "dvc", "repro", "--quiet"]
FLOW = [sys.executable, "-m", "flows.pipeline"]


def make_project(folder: Path, stages: int) -> None:
    """Make a DVC project in which each stage copies the file of the previous one."""
    (folder / "0.txt").write_text("start\n")
    chain = {
        f"stage{n}": {"cmd": f"cp {n - 1}.txt {n}.txt", "deps": [f"{n - 1}.txt"], "outs": [f"{n}.txt"]}
        for n in range(1, stages + 1)
    }
    YAML().dump({"stages": chain}, folder / "dvc.yaml")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=folder, check=True)


def environment(home: Path) -> dict[str, str]:
    """Return an environment with this repository's flows, a new Prefect database and no telemetry."""
    here = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    quiet = {"PREFECT_LOGGING_TO_CONSOLE": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return here | quiet | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(home), "DVC_NO_ANALYTICS": "true"}


@contextmanager
def server(port: int, variables: dict[str, str]) -> Iterator[dict[str, str]]:
    """Run a Prefect server on a port; yield the environment of its clients."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    api = f"http://127.0.0.1:{port}/api"
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_healthy(f"{api}/health"):
            if process.poll() is not None:
                sys.exit(f"Prefect's server ended before it was ready; is port {port} free?")
            time.sleep(0.2)
        yield variables | {"PREFECT_API_URL": api}
    finally:
        process.terminate()
        process.wait()


def measure(command: list[str], folder: Path, variables: dict[str, str], repeats: int) -> list[float]:
    """Return the seconds of each run of a command. Exit if one fails."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - begin)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds


def benchmark(stages: int, repeats: int, port: int) -> dict[str, Any]:
    """Measure each method. The first flow on a new server, which creates the database, is not counted."""
    with tempfile.TemporaryDirectory() as place:
        folder, home = Path(place) / "project", Path(place) / "prefect"
        folder.mkdir()
        make_project(folder, stages)
        variables = environment(home)
        measure(REPRO, folder, variables, 1)
        seconds = {"dvc_repro": measure(REPRO, folder, variables, repeats)}
        with server(port, variables) as clients:
            measure(FLOW, folder, clients, 1)
            seconds["flow_running_server"] = measure(FLOW, folder, clients, repeats)
        seconds["flow_own_server"] = measure(FLOW, folder, variables, repeats)
    return {"stages": stages, "cpus": os.cpu_count(), "ways": record(seconds)}


def record(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return the median seconds, all repeats, the target, and whether it was met, by method."""
    return {
        way: {
            "seconds": statistics.median(repeats),
            "repeats": repeats,
            "target": TARGETS[way],
            "met": statistics.median(repeats) <= TARGETS[way],
        }
        for way, repeats in seconds.items()
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description=__doc__)
    parser.add_argument("--port", type=int, default=4210, help="port of the running server (default: 4210)")
    results = benchmark(STAGES, REPEATS, parser.parse_args().port)
    write_json(RESULTS, results)
    put_table(PAGE, "orchestration", table(results))
    print(table(results))  # noqa: T201


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| | seconds | target |", "| --- | ---: | ---: |"]
    for way, figures in results["ways"].items():
        lines.append(f"| {LABELS[way]} | {figures['seconds']:.1f} | at most {figures['target']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
