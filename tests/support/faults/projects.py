"""Projects with a tiny model, stages that run in them, and the results that they must have."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from tasks.common import runner
from tests.support.models import chat_tokenizer, make_model
from tests.support.project import ENV, TRIAL, change, make_project
from tests.support.results import result_hashes

RESULT_FILES = (
    "data/*.parquet",
    "models/*/*.safetensors",
    "tokens/*/*",
    "reference/*/*",
    "samples/*",
    "margins/*",
    "metrics/**/*.*",
)
"""Files that must be byte-identical. Provenance, model cards and reports contain commits, runs and times."""
POLICY_FILES = (f"models/{TRIAL}/*.safetensors", f"metrics/train/{TRIAL}.csv")
POLICY = Path("models") / TRIAL
MODULES = (
    "fetch_model", "ingest", "validate", "tokens", "sft", "reference_logprobs", "reference_samples",
    "train", "evaluate", "compare"
)  # fmt: skip
WAIT = 600
"""Seconds after which a process counts as hung, also on a busy machine."""
children = get_context("forkserver")
children.set_forkserver_preload([f"tasks.{name}" for name in MODULES])
REFERENCE = "models/reference"


class NotSupported(Exception):
    """This machine cannot inject the fault; the message says why."""


@dataclass(frozen=True)
class Projects:
    """A project before and after an uninterrupted run of all stages."""

    raw: Path
    done: Path
    seconds: dict[str, float]
    """Duration of each stage; empty if the stages ran without DVC."""

    def trained(self, folder: Path) -> Path:
        """Copy the finished project without the policy."""
        shutil.copytree(self.done, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(folder / POLICY)
        (folder / POLICY_FILES[1]).unlink()
        return folder


def make_raw(folder: Path) -> Path:
    """Make a project whose training takes 96 steps and writes a checkpoint at each."""
    tokenizer = chat_tokenizer()
    model = make_model(
        "llama", folder / "model", vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    tokenizer.save_pretrained(model)
    raw = folder / "raw"
    raw.mkdir()
    make_project(raw, model)
    change(raw, {"run.checkpoint_minutes": 0, "sft.pairs_per_step": 2, "dpo.pairs_per_step": 2, "dpo.epochs": 8})
    return raw


def make_quick(folder: Path) -> Projects:
    """Run the stages up to the policy without DVC."""
    raw = make_raw(folder)
    done = shutil.copytree(raw, folder / "done")
    for name in MODULES[:8]:
        Stage(done, name).wait()
    return Projects(raw, done, {})


def make_complete(folder: Path) -> Projects:
    """Run all stages with DVC."""
    raw = make_raw(folder)
    done, begun = shutil.copytree(raw, folder / "done"), {}
    run = Repro(done)
    for stage in run.stages():
        begun[stage] = time.monotonic()
    run.wait()
    times = [*begun.values(), time.monotonic()]
    seconds = [end - start for start, end in itertools.pairwise(times)]
    return Projects(raw, done, dict(zip(begun, seconds, strict=True)))


def assert_same(folder: Path, projects: Projects, patterns: tuple[str, ...] = RESULT_FILES) -> None:
    """Assert that all results exist and equal those of the uninterrupted run, and that no partial file is left."""
    found, expected = result_hashes(folder, patterns), result_hashes(projects.done, patterns)
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not differing, f"files differ: {differing}"
    left = [str(path) for path in folder.rglob(".*.partial")]
    assert not left, f"partial files: {left}"


def run_stage(
    folder: Path, name: str, arguments: tuple[str, ...], log: Path, before: Callable[[], None] | None
) -> None:
    """Do what `python -m tasks.NAME ARGUMENTS` does, in a process that has imported its libraries already."""
    os.setsid()
    os.chdir(folder)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"tasks/{name}.py", *arguments]
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if before:
        before()
    try:
        runner.run(import_module(f"tasks.{name}").main)
    finally:
        print("\nVmPeak", memory("VmPeak"), flush=True)


def memory(field: str) -> int:
    """Return the bytes of address space that Linux reports in a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+)", status)
    assert found, status
    return int(found[1]) * 1024


class Stage:
    """A stage that runs in a project, in its own process group."""

    def __init__(self, folder: Path, name: str, before: Callable[[], None] | None = None) -> None:
        self.log = Path(tempfile.mkstemp(suffix=f".{name}.log")[1])
        arguments = (TRIAL,) if name in ("train", "evaluate") else ()
        self.process = children.Process(target=run_stage, args=(folder, name, arguments, self.log, before))
        self.process.start()

    def text(self) -> str:
        """Return the output so far."""
        return self.log.read_text(errors="replace")

    def await_step(self, step: int) -> None:
        """Wait until the training of 96 steps has done this step."""

        def reached() -> bool:
            steps = [int(found) for found in re.findall(r"(\d+)/96 \[", self.text())]
            return max(steps, default=0) >= step or not self.process.is_alive()

        wait_for(reached)

    def kill(self) -> None:
        """Kill the process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def wait(self, code: int = 0, *patterns: str) -> str:
        """Wait for the end; assert the exit code and that the output matches the patterns."""
        self.process.join(WAIT)
        text = self.text()
        self.log.unlink()
        assert self.process.exitcode == code, f"exit code {self.process.exitcode}: {text[-3000:]}"
        for pattern in patterns:
            assert re.search(pattern, text), f"{pattern!r} is not in {text[-3000:]}"
        if code in (1, 2, 143):
            assert "Traceback" not in text, text[-3000:]
        return text


class Repro:
    """A `dvc repro` that runs in a project, in its own process group."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.process = subprocess.Popen(
            ["dvc", "repro", *arguments], cwd=folder, env={**ENV, **env}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []

    def stages(self) -> Iterator[str]:
        """Yield the name of each stage when DVC starts it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Running stage"):
                yield line.split("'")[1]

    def kill(self) -> None:
        """Kill the process group, which includes the stage."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, code: int = 0) -> str:
        """Wait for the end; assert the exit code."""
        for _ in self.stages():
            pass
        found = self.process.wait(WAIT)
        text = "".join(self.lines)
        assert (found == 0) is (code == 0), f"exit code {found}: {text[-3000:]}"
        return text


def wait_for(condition: Callable[[], object]) -> None:
    """Poll until the condition is true."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"timeout after {WAIT} s"
        time.sleep(0.01)


def dvc(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run DVC; return its exit code and its output."""
    done = subprocess.run(["dvc", *arguments], cwd=folder, env=ENV, capture_output=True, text=True, timeout=WAIT)
    return done.returncode, done.stdout + done.stderr
