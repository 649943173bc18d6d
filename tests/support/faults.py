"""Fault injection on a project with a tiny model: `make faults`.

Each fault is one function. It injects the fault once and asserts that the project recovers: all results equal
those of an uninterrupted run byte for byte, and no partial file is used. `test_faults.py` runs the quick faults
once. This module runs all faults, as often as `FAULTS` says, and writes `benchmarks/results/faults.json` and the
table of `docs/operations/faults.md`.
"""

import argparse
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import mlflow
import pandas as pd
from safetensors.torch import load_file, save_file

from benchmarks.page import put_table
from dpo.common.files import write_json
from flows.servers import is_healthy
from tasks.common import paths, runner
from tests.support import nightly
from tests.support.mlflow_server import Server
from tests.support.models import chat_tokenizer, free_ports, make_model
from tests.support.project import ENV, ROOT, TRIAL, change, make_project
from tests.support.results import result_hashes

RESULTS, PAGE = ROOT / "benchmarks/results/faults.json", ROOT / "docs/operations/faults.md"
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
KILLS_PER_RUN = 10
WAIT = 600
"""Seconds after which a process counts as hung, also on a busy machine."""

children = get_context("forkserver")
children.set_forkserver_preload([f"tasks.{name}" for name in MODULES])


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


# Faults


def kills_of_repro(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Send SIGKILL to `dvc repro` and its stages at random times of every stage; the next run completes."""
    shutil.copytree(projects.raw, folder, dirs_exist_ok=True)
    names = list(projects.seconds)
    plan = [*names, *draw.choices(names, k=KILLS_PER_RUN - len(names))]
    for name in sorted(plan, key=names.index):
        run, killed = Repro(folder), False
        for stage in run.stages():
            if names.index(stage) >= names.index(name):
                time.sleep(draw.uniform(0, 1.02) * projects.seconds[name])
                run.kill()
                killed = True
                break
        assert killed or run.process.wait() == 0, "".join(run.lines)[-3000:]
    Repro(folder).wait()
    assert_same(folder, projects)
    assert "up to date" in dvc(folder, "status")[1]


def kills_of_a_training(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Kill one training twice at random steps; it resumes from its last checkpoint."""
    projects.trained(folder)
    for step in sorted(draw.sample(range(2, 90), 2)):
        training = Stage(folder, "train")
        training.await_step(step)
        training.kill()
        assert not (folder / POLICY).exists()
    Stage(folder, "train").wait()
    assert_same(folder, projects, POLICY_FILES)
    assert not (folder / ".training-progress" / TRIAL).exists()


def sigterm(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Send SIGTERM to a training that is too short for scheduled checkpoints."""
    change(projects.trained(folder), {"run.checkpoint_minutes": 60})
    training = Stage(folder, "train")
    training.await_step(draw.randrange(2, 60))
    start = time.monotonic()
    os.kill(training.process.pid, signal.SIGTERM)
    text = training.wait(143, r"stopped after step \d+ of 96; run again")
    assert time.monotonic() - start < 30
    stopped = re.search(r"stopped after step (\d+)", text)
    assert stopped
    assert len(list((folder / ".training-progress" / TRIAL).glob(f"*/checkpoint-{stopped[1]}/sha256.json"))) == 1
    Stage(folder, "train").wait()
    assert_same(folder, projects, POLICY_FILES)


@contextmanager
def disk(folder: Path, size: str = "1g") -> Iterator[Callable[[str], None]]:
    """Mount a small file system at a folder; yield a function that remounts it with other options."""

    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    folder.mkdir(parents=True, exist_ok=True)
    if not shutil.which("mount") or os.geteuid():
        raise NotSupported("mounting a file system needs root")
    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    except AssertionError as error:
        raise NotSupported(f"mounting a file system failed: {error}") from error
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def copy_models(projects: Projects, folder: Path) -> None:
    """Copy all models except the policy."""
    policy = shutil.ignore_patterns(TRIAL)
    shutil.copytree(projects.done / "models", folder / "models", dirs_exist_ok=True, ignore=policy)


def size_option(folder: Path, free: int) -> str:
    """Return the mount option that leaves `free` bytes on the file system of a folder."""
    used = os.statvfs(folder)
    return f"size={(used.f_blocks - used.f_bfree) * used.f_frsize + free}"


def disk_full_under_a_training(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Fill the disk so that the policy cannot be saved."""
    projects.trained(folder)
    with disk(folder / "models") as remount:
        copy_models(projects, folder)
        remount(size_option(folder / "models", draw.randrange(80_000)))
        Stage(folder, "train").wait(1, "No space left on device.*run again")
        assert not (folder / POLICY).exists()
        remount("size=1g")
        Stage(folder, "train").wait()
        assert_same(folder, projects, POLICY_FILES)


def disk_full_under_checkpoints(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Fill the disk of the checkpoints; training continues without them."""
    projects.trained(folder)
    with disk(folder / ".training-progress") as remount:
        remount(size_option(folder / ".training-progress", draw.randrange(4096, 400_000)))
        Stage(folder, "train").wait(0, r"checkpoint-\d+ could not be written .*training continues without it")
    assert_same(folder, projects, POLICY_FILES)


def disk_full_anywhere(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Fill the disk of the project at a random time of `dvc repro`."""
    needed = sum(file.stat().st_size for file in projects.done.rglob("*") if file.is_file())
    needed -= sum(file.stat().st_size for file in projects.raw.rglob("*") if file.is_file())
    with disk(folder) as remount:
        shutil.copytree(projects.raw, folder, dirs_exist_ok=True)
        remount(size_option(folder, int(draw.uniform(0.02, 0.9) * needed)))
        text = Repro(folder).wait(1)
        assert re.search(r"No space left|disk is full|os error 28|disk I/O error", text), text[-3000:]
        remount("size=1g")
        Repro(folder).wait()
        assert_same(folder, projects)


def read_only_output(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Make the folder of the policies read-only."""
    projects.trained(folder)
    with disk(folder / "models") as remount:
        copy_models(projects, folder)
        remount("ro")
        Stage(folder, "train").wait(1, "Read-only file system.*run again")
        assert not (folder / POLICY).exists()
        remount("rw")
        Stage(folder, "train").wait()
        assert_same(folder, projects, POLICY_FILES)


@dataclass(frozen=True)
class MemoryLimit:
    """Limit the address space of a training to its size at the start plus `size` bytes."""

    size: int | None

    def __call__(self) -> None:
        from tasks import train

        train_dpo = train.train_dpo

        def limited(*args, **kwargs):
            start, before = memory("VmSize"), resource.getrlimit(resource.RLIMIT_AS)
            if self.size is not None:
                resource.setrlimit(resource.RLIMIT_AS, (start + self.size, before[1]))
            log = train_dpo(*args, **kwargs)
            resource.setrlimit(resource.RLIMIT_AS, before)
            print("\nVmSize", start, "VmPeak", memory("VmPeak"), flush=True)
            return log

        train.train_dpo = limited


def out_of_memory(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Run out of memory in a step; the micro-batch is split, and the loss is the same except for rounding."""
    change(projects.trained(folder), {"engine.max_length": 512, "dpo.pairs_per_step": 288, "dpo.epochs": 1})
    pairs = pd.read_parquet(folder / paths.TRAIN)
    pairs["prompt"] += " A long, long film." * 25
    pairs = pd.concat([pairs.assign(id=pairs["id"].astype(str) + f" {n}") for n in range(12)], ignore_index=True)
    pairs.to_parquet(folder / paths.TRAIN)
    Stage(folder, "tokens").wait()
    Stage(folder, "reference_logprobs").wait()
    change(folder, {"engine.max_tokens_per_microbatch": 1_000_000})
    measured = re.search(r"VmSize (\d+) VmPeak (\d+)", Stage(folder, "train", before=MemoryLimit(None)).wait())
    assert measured
    plain = pd.read_csv(folder / POLICY_FILES[1])
    size = int(draw.uniform(0.4, 0.8) * (int(measured[2]) - int(measured[1])))
    Stage(folder, "train", before=MemoryLimit(size)).wait(0, r"step 1: out of memory; .*computed in 2 parts")
    split = pd.read_csv(folder / POLICY_FILES[1])
    pd.testing.assert_frame_equal(split, plain, rtol=1e-3, atol=1e-4)


def clock_jumps() -> None:
    """Make `time.time` jump by days, back and forth, at each call."""
    now, days = time.time, itertools.cycle([-1, 2, -3, 4])
    time.time = lambda: now() + 86400 * next(days)


def clock(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Kill and resume a training while the clock jumps and its checkpoints have times in the wrong order."""
    projects.trained(folder)
    training = Stage(folder, "train", before=clock_jumps)
    training.await_step(draw.randrange(3, 80))
    training.kill()
    for checkpoint in folder.glob(f".training-progress/{TRIAL}/*/checkpoint-*"):
        os.utime(checkpoint, (-int(checkpoint.name[11:]) * 86400 + 2e9,) * 2)
    Stage(folder, "train", before=clock_jumps).wait()
    assert_same(folder, projects, POLICY_FILES)


def flip(path: Path, where: float = 0.5) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def append_space(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def other_order(path: Path) -> None:
    pd.read_parquet(path).iloc[::-1].to_parquet(path)


def another_text(path: Path) -> None:
    pairs = pd.read_parquet(path)
    pairs.loc[0, "chosen"] += "!"
    pairs.to_parquet(path)


def another_engine() -> None:
    import_module("dpo.engine.reference_cache").ENGINE_VERSION += 1


REFERENCE = "models/reference"
TAMPERED: list[tuple[str, Callable[[Path], None], str]] = [
    (f"{REFERENCE}/model.safetensors", lambda path: flip(path, 1), "weights"),
    (f"{REFERENCE}/config.json", append_space, "config"),
    (f"{REFERENCE}/tokenizer.json", append_space, "tokenizer"),
    (f"{REFERENCE}/chat_template.jinja", append_space, "template"),
    ("data/train.parquet", other_order, "pairs"),
    ("data/train.parquet", another_text, "pairs"),
    ("tokens/train/table.arrow", flip, "table"),
    ("params.yaml", lambda path: change(path.parent, {"engine.max_length": 127}), "max_length"),
    ("params.yaml", lambda path: change(path.parent, {"engine.precision": "bf16"}), "precision"),
    ("params.yaml", lambda path: change(path.parent, {"engine.compile": True}), "compile"),
    ("reference/train/logps.arrow", flip, "logps"),
]
"""Inputs of a training's token table and reference cache: a file, how it is changed, and the name in the error."""


def tampered_by_hand(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Change each input of a training without DVC; the stage refuses table or cache, and names the input."""
    projects.trained(folder)
    for name, tamper, key in TAMPERED:
        tamper(folder / name)
        refused = rf"(tokens|reference)/train: stale (token table|reference cache), refused: .*\b{key}\b.* differ"
        Stage(folder, "train").wait(2, refused)
        shutil.copy2(projects.done / name, folder / name)
    Stage(folder, "train", before=another_engine).wait(2, "refused: engine differ")
    (folder / "reference/train/manifest.json").write_text("{")
    Stage(folder, "train").wait(2, r"reference/train: no .*reference cache")
    assert not (folder / POLICY).exists()


def tampered_under_dvc(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Flip a bit of every result that later stages read; `dvc repro` recomputes or restores it."""
    shutil.copytree(projects.done, folder, dirs_exist_ok=True)
    weights = [f"{model}/model.safetensors" for model in ("models/base", REFERENCE, str(POLICY))]
    names = ["data/train.parquet", "data/eval.parquet", "tokens/train/table.arrow"]
    names += ["reference/train/logps.arrow", *weights]
    for name in names:
        flip(folder / name, draw.random())
    Repro(folder).wait()
    assert_same(folder, projects)


def dvc(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run DVC; return its exit code and its output."""
    done = subprocess.run(["dvc", *arguments], cwd=folder, env=ENV, capture_output=True, text=True, timeout=WAIT)
    return done.returncode, done.stdout + done.stderr


def remote_unreachable(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Run `dvc push` and `dvc pull` while the remote is unreachable, then again when it is reachable."""
    shutil.copytree(projects.done, folder, dirs_exist_ok=True)
    dvc(folder, "remote", "add", "--default", "store", "http://127.0.0.1:9")
    code, text = dvc(folder, "push")
    assert code, text
    assert re.search("ERROR.*", text), text
    assert_same(folder, projects)
    store = folder / "store"
    dvc(folder, "remote", "modify", "store", "url", str(store))
    assert dvc(folder, "push")[0] == 0
    for lost in (".dvc/cache", "models/base", REFERENCE, str(POLICY), "reference"):
        shutil.rmtree(folder / lost)
    dvc(folder, "remote", "modify", "store", "url", "http://127.0.0.1:9")
    code, text = dvc(folder, "pull")
    assert code, text
    dvc(folder, "remote", "modify", "store", "url", str(store))
    assert dvc(folder, "pull")[0] == 0
    assert_same(folder, projects)


def two_repros(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Run two `dvc repro` of one training in one checkout; one trains, the other fails or finds it up to date."""
    projects.trained(folder)
    runs = [Repro(folder, "--single-item", f"train@{TRIAL}") for _ in range(2)]
    texts = [run.process.communicate(timeout=WAIT)[0] for run in runs]
    codes = [run.process.returncode for run in runs]
    assert 0 in codes, texts
    for code, text in zip(codes, texts, strict=True):
        assert code == 0 or re.search(r"lock|busy", text), text
    assert_same(folder, projects, POLICY_FILES)


def shared_cache(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Run two checkouts with a shared DVC cache at once."""
    runs = []
    for name in ("one", "other"):
        shutil.copytree(projects.raw, folder / name)
        dvc(folder / name, "cache", "dir", "--local", str(folder / "cache"))
        runs.append(Repro(folder / name, "reference_logprobs"))
    for run, name in zip(runs, ("one", "other"), strict=True):
        run.wait()
        assert_same(folder / name, projects, ("data/*.parquet", f"{REFERENCE}/*.safetensors", "reference/*/*"))


def not_finite(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Put an infinity into the weights; training stops before its first step and names the pairs."""
    projects.trained(folder)
    shutil.rmtree(folder / REFERENCE)
    weights = load_file(folder / "models/base/model.safetensors")
    weights["model.norm.weight"][draw.randrange(32)] = math.inf
    save_file(weights, folder / "models/base/model.safetensors", {"format": "pt"})
    Stage(folder, "sft").wait(1, r"step 1: the loss is nan, from the pairs \S+")
    assert not (folder / REFERENCE).exists()
    assert list((folder / ".training-progress/sft").glob("*/non-finite-step-1-*.json"))


@dataclass(frozen=True)
class TrackAt:
    """Set the address of MLflow's server."""

    url: str

    def __call__(self) -> None:
        os.environ["MLFLOW_TRACKING_URI"] = self.url


def mlflow_down(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Train while MLflow's server is down, or is killed during the training; all is uploaded later."""
    for case in ("start", "middle"):
        here = projects.trained(folder / case)
        server = Server(folder / case)
        try:
            if case == "middle":
                server.start()
            training = Stage(here, "train", before=TrackAt(server.url))
            if case == "middle":
                training.await_step(draw.randrange(2, 80))
                server.kill()
            training.wait()
            assert_same(here, projects, POLICY_FILES)
            server.start()
            env = {**ENV, "MLFLOW_TRACKING_URI": server.url}
            subprocess.run([sys.executable, "-m", "tasks.commands.cli", "sync"], cwd=here, env=env, check=True)
            client = mlflow.MlflowClient(server.url)
            runs = client.search_runs(["1"], f"tags.`dpo.trial` = '{TRIAL}'")
            assert [run.info.status for run in runs] == ["FINISHED"]
            steps = [point.step for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]
            assert sorted(steps) == list(range(1, 97))
        finally:
            server.kill()


def prefect_down(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Kill Prefect's server while a flow runs a stage; all stages complete, then an error names the server."""
    shutil.copytree(projects.raw, folder, dirs_exist_ok=True)
    port = str(*free_ports(1))
    env = {**ENV, "PREFECT_HOME": str(folder / ".prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port],
        cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    log = folder / "flow.log"
    try:
        wait_for(lambda: is_healthy(f"http://127.0.0.1:{port}/api/health"))
        with log.open("wb") as file:
            flow = subprocess.Popen(
                [sys.executable, "-m", "flows.pipeline"], cwd=folder, env=env, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: "Running stage 'sft'" in log.read_text() or flow.poll() is not None)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert flow.wait(WAIT) == 1, log.read_text()[-3000:]
    assert re.search(
        r"error: Prefect's server at \S+ cannot be reached .* it runs only what is missing", log.read_text()
    )
    run = Repro(folder)
    assert not list(run.stages()), run.lines
    run.wait()
    assert_same(folder, projects)


@dataclass(frozen=True)
class Fault:
    """One fault and its row in the table."""

    name: str
    once: Callable[[Projects, Path, random.Random], object]
    lost: str
    """What the user loses if the project recovers."""
    times: int
    """Number of repetitions in `make faults`."""
    tries: int = 1
    """Number of faults per repetition."""
    quick: bool = False
    """Whether the fault needs at most one training and no DVC."""


STEP = "the current step"
ROOM = "the current stage, until there is space"
FAULTS = [
    Fault(
        "`dvc repro` killed, all stages",
        kills_of_repro,
        "the current step of a training, or another stage",
        5,
        KILLS_PER_RUN,
    ),
    Fault("training killed, `checkpoint_minutes: 0`", kills_of_a_training, STEP, 5, 2, quick=True),
    Fault("training stopped with SIGTERM", sigterm, "nothing", 5, quick=True),
    Fault("disk full under the checkpoints", disk_full_under_checkpoints, "checkpoints", 3, quick=True),
    Fault("disk full under the policy", disk_full_under_a_training, ROOM, 3, quick=True),
    Fault("disk of the project full", disk_full_anywhere, ROOM, 2),
    Fault("read-only `models/`", read_only_output, "the current stage", 3, quick=True),
    Fault("out of memory in a step", out_of_memory, "speed", 3, quick=True),
    Fault("clock jumps, wrong times of checkpoints", clock, STEP, 3, quick=True),
    Fault("MLflow's server down", mlflow_down, "nothing", 1, 2),
    Fault("Prefect's server killed in a flow", prefect_down, "the end of the flow run", 1),
    Fault("DVC's remote unreachable", remote_unreachable, "nothing", 1, 2),
    Fault(
        "inputs of the reference cache changed manually",
        tampered_by_hand,
        "nothing",
        1,
        len(TAMPERED) + 2,
        quick=True,
    ),
    Fault("bits of results flipped, then `dvc repro`", tampered_under_dvc, "the flipped files", 1, 6),
    Fault("two `dvc repro` in one checkout", two_repros, "nothing", 2),
    Fault("two checkouts with one DVC cache at once", shared_cache, "nothing", 1),
    Fault("non-finite loss", not_finite, "nothing", 2, quick=True),
]


def table(results: list[dict[str, object]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| fault | injected | survived | lost |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {row['fault']} | {row['tried']} | {row['survived']} | {row['lost']} |" for row in results]
    return "\n".join(lines)


def main() -> None:
    """Inject all faults. Exit with 1 if the project did not recover from one."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--only", nargs="*", help="functions of this module; results are not written")
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    draw, results = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        projects = make_complete(Path(name))
        for fault in FAULTS:
            if arguments.only and fault.once.__name__ not in arguments.only:
                continue
            tried = survived = 0
            lost = fault.lost
            for _ in range(fault.times):
                folder = Path(name) / "trial"
                folder.mkdir()
                tried += fault.tries
                try:
                    fault.once(projects, folder, draw)
                    survived += fault.tries
                except NotSupported as error:
                    tried, lost = 0, f"**not run**: {error}"
                    break
                except Exception:  # noqa: BLE001  # any error is a result
                    traceback.print_exc()
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
            results.append({"fault": fault.name, "tried": tried, "survived": survived, "lost": lost})
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if not arguments.only:
        results += nightly.run(arguments.seed)
        print(table(results[-2:]))
        write_json(RESULTS, results)
        put_table(PAGE, "faults", table(results))
    sys.exit(any(row["survived"] != row["tried"] for row in results))


if __name__ == "__main__":
    main()
