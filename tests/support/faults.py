"""What goes wrong on real machines, done to a tiny project: `make faults`.

Every fault is one function, which does it once and asserts that the project survives: no result differs by a byte
from those of an undisturbed run, and nothing half-written is taken for whole. `test_faults.py` does the quick ones
once. Here all are done, as often as `FAULTS` tells. Writes `benchmarks/results/faults.json` and the table of
`docs/faults.md`.
"""

import argparse
import hashlib
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
from flows.servers import answers
from tasks.common import paths, runner
from tests.support.mlflow_server import Server
from tests.support.models import chat_tokenizer, free_ports, make_model
from tests.support.project import ENV, ROOT, TRIAL, change, make_project

RESULTS, PAGE = ROOT / "benchmarks/results/faults.json", ROOT / "docs/faults.md"
RESULT_FILES = (
    "data/*.parquet",
    "models/*/*.safetensors",
    "reference/*/*",
    "samples/*",
    "margins/*",
    "metrics/**/*.*",
)
"""What has to be the same to the byte. Provenance, model cards and reports name commits, runs and times."""
POLICY_FILES = (f"models/{TRIAL}/*.safetensors", f"metrics/train/{TRIAL}.csv")
POLICY = Path("models") / TRIAL
MODULES = (
    "fetch_model", "ingest", "validate", "sft", "reference_logprobs", "reference_samples",
    "train", "evaluate", "compare"
)  # fmt: skip
KILLS_A_RUN = 10
WAIT = 600
"""Seconds after which something counts as hung, on a machine however busy."""

children = get_context("forkserver")
children.set_forkserver_preload([f"tasks.{name}" for name in MODULES])


class Untried(Exception):
    """This machine cannot do the fault; says why."""


@dataclass(frozen=True)
class Projects:
    """One project before and after an undisturbed run of all stages."""

    raw: Path
    done: Path
    seconds: dict[str, float]
    """How long each stage took; empty if DVC did not run them."""

    def trained(self, folder: Path) -> Path:
        """A copy of which only the policy is missing."""
        shutil.copytree(self.done, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(folder / POLICY)
        (folder / POLICY_FILES[1]).unlink()
        return folder


def make_raw(folder: Path) -> Path:
    """A project whose training takes 96 steps and keeps a checkpoint of each."""
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
    """Up to the policy, without DVC."""
    raw = make_raw(folder)
    done = shutil.copytree(raw, folder / "done")
    for name in MODULES[:7]:
        Stage(done, name).ends()
    return Projects(raw, done, {})


def make_whole(folder: Path) -> Projects:
    """Through DVC, as a user does it."""
    raw = make_raw(folder)
    done, begun = shutil.copytree(raw, folder / "done"), {}
    run = Repro(done)
    for stage in run.stages():
        begun[stage] = time.monotonic()
    run.ends()
    times = [*begun.values(), time.monotonic()]
    seconds = [end - start for start, end in itertools.pairwise(times)]
    return Projects(raw, done, dict(zip(begun, seconds, strict=True)))


def hashes(folder: Path, patterns: tuple[str, ...] = RESULT_FILES) -> dict[str, str]:
    """Of the results, by path."""
    files = (file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name != "provenance.json"
    }


def assert_same(folder: Path, projects: Projects, patterns: tuple[str, ...] = RESULT_FILES) -> None:
    """All results are there and are those of the undisturbed run; nothing half-written is left."""
    found, wanted = hashes(folder, patterns), hashes(projects.done, patterns)
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    assert not differing, f"differ: {differing}"
    left = [str(path) for path in folder.rglob(".*.partial")]
    assert not left, f"left behind: {left}"


def enter(folder: Path, name: str, words: tuple[str, ...], log: Path, before: Callable[[], None] | None) -> None:
    """Be the stage: what `python -m tasks.NAME` does once it has imported what it needs."""
    os.setsid()
    os.chdir(folder)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"tasks/{name}.py", *words]
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if before:
        before()
    try:
        runner.run(import_module(f"tasks.{name}").main)
    finally:
        print("\nVmPeak", memory("VmPeak"), flush=True)


def memory(what: str) -> int:
    """Bytes of address space, from Linux."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{what}:\s+(\d+)", status)
    assert found, status
    return int(found[1]) * 1024


class Stage:
    """A stage that was started in a project, in a process group of its own."""

    def __init__(self, folder: Path, name: str, *words: str, before: Callable[[], None] | None = None) -> None:
        self.log = Path(tempfile.mkstemp(suffix=f".{name}.log")[1])
        words = words or ((TRIAL,) if name in ("train", "evaluate") else ())
        self.process = children.Process(target=enter, args=(folder, name, words, self.log, before))
        self.process.start()

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def await_step(self, step: int) -> None:
        """Until the training, of 96 steps, is at this one."""

        def there() -> bool:
            steps = [int(found) for found in re.findall(r"(\d+)/96 \[", self.text())]
            return max(steps, default=0) >= step or not self.process.is_alive()

        wait_for(there)

    def kill(self) -> None:
        """The whole group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def ends(self, code: int = 0, *told: str) -> str:
        """With this exit code and these words."""
        self.process.join(WAIT)
        text = self.text()
        self.log.unlink()
        assert self.process.exitcode == code, f"exit code {self.process.exitcode}: {text[-3000:]}"
        for words in told:
            assert re.search(words, text), f"{words!r} is not in {text[-3000:]}"
        if code in (1, 2, 143):
            assert "Traceback" not in text, text[-3000:]
        return text


class Repro:
    """A `dvc repro` that was started, in a process group of its own."""

    def __init__(self, folder: Path, *words: str, **env: str) -> None:
        self.process = subprocess.Popen(
            ["dvc", "repro", *words], cwd=folder, env={**ENV, **env}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []

    def stages(self) -> Iterator[str]:
        """Their names, when DVC begins to run them."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("Running stage"):
                yield line.split("'")[1]

    def kill(self) -> None:
        """With all that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ends(self, code: int = 0) -> str:
        """With this exit code."""
        for _ in self.stages():
            pass
        found = self.process.wait(WAIT)
        text = "".join(self.lines)
        assert (found == 0) is (code == 0), f"exit code {found}: {text[-3000:]}"
        return text


def wait_for(happens: Callable[[], object]) -> None:
    """Look again and again."""
    deadline = time.monotonic() + WAIT
    while not happens():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# Faults


def kills_of_repro(projects: Projects, folder: Path, draw: random.Random) -> None:
    """SIGKILL to `dvc repro` and its stages, at random moments of every stage; then it completes."""
    shutil.copytree(projects.raw, folder, dirs_exist_ok=True)
    names = list(projects.seconds)
    plan = [*names, *draw.choices(names, k=KILLS_A_RUN - len(names))]
    for name in sorted(plan, key=names.index):
        run, killed = Repro(folder), False
        for stage in run.stages():
            if names.index(stage) >= names.index(name):
                time.sleep(draw.uniform(0, 1.02) * projects.seconds[name])
                run.kill()
                killed = True
                break
        assert killed or run.process.wait() == 0, "".join(run.lines)[-3000:]
    Repro(folder).ends()
    assert_same(folder, projects)
    assert "up to date" in dvc(folder, "status")[1]


def kills_of_a_training(projects: Projects, folder: Path, draw: random.Random) -> None:
    """SIGKILL to `dvc repro` of one training, twice at random steps; it goes on from its last checkpoint."""
    projects.trained(folder)
    for step in sorted(draw.sample(range(2, 90), 2)):
        training = Stage(folder, "train")
        training.await_step(step)
        training.kill()
        assert not (folder / POLICY).exists()
    Stage(folder, "train").ends()
    assert_same(folder, projects, POLICY_FILES)
    assert not (folder / ".training-progress" / TRIAL).exists()


def sigterm(projects: Projects, folder: Path, draw: random.Random) -> None:
    """SIGTERM to a training that keeps no checkpoints of its own accord."""
    change(projects.trained(folder), {"run.checkpoint_minutes": 60})
    training = Stage(folder, "train")
    training.await_step(draw.randrange(2, 60))
    asked = time.monotonic()
    os.kill(training.process.pid, signal.SIGTERM)
    text = training.ends(143, r"stopped after step \d+ of 96; run again to resume")
    assert time.monotonic() - asked < 30
    stopped = re.search(r"stopped after step (\d+)", text)
    assert stopped
    assert len(list((folder / ".training-progress" / TRIAL).glob(f"*/checkpoint-{stopped[1]}/sha256.json"))) == 1
    Stage(folder, "train").ends()
    assert_same(folder, projects, POLICY_FILES)


@contextmanager
def disk(folder: Path, size: str = "1g") -> Iterator[Callable[[str], None]]:
    """A small disk of its own in the place of a folder; gives a function that changes its options."""

    def mount(*words: str) -> None:
        done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    folder.mkdir(parents=True, exist_ok=True)
    if not shutil.which("mount") or os.geteuid():
        raise Untried("only root may mount a disk")
    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    except AssertionError as error:
        raise Untried(f"no disk can be mounted here: {error}") from error
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def copy_models(projects: Projects, folder: Path) -> None:
    """All but the policy."""
    but = shutil.ignore_patterns(TRIAL)
    shutil.copytree(projects.done / "models", folder / "models", dirs_exist_ok=True, ignore=but)


def full(folder: Path, room: int) -> str:
    """The mount option that leaves this room on the disk of a folder, in bytes."""
    used = os.statvfs(folder)
    return f"size={(used.f_blocks - used.f_bfree) * used.f_frsize + room}"


def disk_full_under_a_training(projects: Projects, folder: Path, draw: random.Random) -> None:
    """No room for the policy."""
    projects.trained(folder)
    with disk(folder / "models") as remount:
        copy_models(projects, folder)
        remount(full(folder / "models", draw.randrange(80_000)))
        Stage(folder, "train").ends(1, "No space left on device.*free disk space")
        assert not (folder / POLICY).exists()
        remount("size=1g")
        Stage(folder, "train").ends()
        assert_same(folder, projects, POLICY_FILES)


def disk_full_under_checkpoints(projects: Projects, folder: Path, draw: random.Random) -> None:
    """No room for checkpoints alone: training goes on without."""
    projects.trained(folder)
    with disk(folder / ".training-progress") as remount:
        remount(full(folder / ".training-progress", draw.randrange(4096, 400_000)))
        Stage(folder, "train").ends(0, r"checkpoint-\d+ could not be written .*training goes on without it")
    assert_same(folder, projects, POLICY_FILES)


def disk_full_anywhere(projects: Projects, folder: Path, draw: random.Random) -> None:
    """The disk of the whole project is full at a random moment of `dvc repro`."""
    needed = sum(file.stat().st_size for file in projects.done.rglob("*") if file.is_file())
    needed -= sum(file.stat().st_size for file in projects.raw.rglob("*") if file.is_file())
    with disk(folder) as remount:
        shutil.copytree(projects.raw, folder, dirs_exist_ok=True)
        remount(full(folder, int(draw.uniform(0.02, 0.9) * needed)))
        text = Repro(folder).ends(1)
        assert re.search(r"No space left|disk is full|os error 28|disk I/O error", text), text[-3000:]
        remount("size=1g")
        Repro(folder).ends()
        assert_same(folder, projects)


def read_only_output(projects: Projects, folder: Path, draw: random.Random) -> None:
    """The folder of the policies cannot be written."""
    projects.trained(folder)
    with disk(folder / "models") as remount:
        copy_models(projects, folder)
        remount("ro")
        Stage(folder, "train").ends(1, "Read-only file system.*make it writable")
        assert not (folder / POLICY).exists()
        remount("rw")
        Stage(folder, "train").ends()
        assert_same(folder, projects, POLICY_FILES)


@dataclass(frozen=True)
class MemoryLimit:
    """Lets a training have so many bytes of address space beyond those that it begins with."""

    size: int | None

    def __call__(self) -> None:
        from tasks import train

        train_dpo = train.train_dpo

        def starved(*args, **kwargs):
            start, before = memory("VmSize"), resource.getrlimit(resource.RLIMIT_AS)
            if self.size is not None:
                resource.setrlimit(resource.RLIMIT_AS, (start + self.size, before[1]))
            log = train_dpo(*args, **kwargs)
            resource.setrlimit(resource.RLIMIT_AS, before)
            print("\nVmSize", start, "VmPeak", memory("VmPeak"), flush=True)
            return log

        train.train_dpo = starved


def out_of_memory(projects: Projects, folder: Path, draw: random.Random) -> None:
    """A micro-batch of all pairs of a step does not fit: it goes in parts, to the same loss but for rounding."""
    change(projects.trained(folder), {"engine.max_length": 512, "dpo.pairs_per_step": 288, "dpo.epochs": 1})
    pairs = pd.read_parquet(folder / paths.TRAIN)
    pairs["prompt"] += " A long, long film." * 25
    pairs = pd.concat([pairs.assign(id=pairs["id"].astype(str) + f" {n}") for n in range(12)], ignore_index=True)
    pairs.to_parquet(folder / paths.TRAIN)
    Stage(folder, "reference").ends()
    change(folder, {"engine.max_tokens_per_microbatch": 1_000_000})
    measured = re.search(r"VmSize (\d+) VmPeak (\d+)", Stage(folder, "train", before=MemoryLimit(None)).ends())
    assert measured
    plain = pd.read_csv(folder / POLICY_FILES[1])
    room = int(draw.uniform(0.4, 0.8) * (int(measured[2]) - int(measured[1])))
    Stage(folder, "train", before=MemoryLimit(room)).ends(0, r"step 1: out of memory; .*computed in 2 parts")
    starved = pd.read_csv(folder / POLICY_FILES[1])
    pd.testing.assert_frame_equal(starved, plain, rtol=1e-3, atol=1e-4)


def clock_jumps() -> None:
    """A clock that goes back a day at each look, then ahead two, and so on."""
    now, days = time.time, itertools.cycle([-1, 2, -3, 4])
    time.time = lambda: now() + 86400 * next(days)


def clock(projects: Projects, folder: Path, draw: random.Random) -> None:
    """The clock jumps while a training is killed and goes on, and its checkpoints have times out of order."""
    projects.trained(folder)
    training = Stage(folder, "train", before=clock_jumps)
    training.await_step(draw.randrange(3, 80))
    training.kill()
    for checkpoint in folder.glob(f".training-progress/{TRIAL}/*/checkpoint-*"):
        os.utime(checkpoint, (-int(checkpoint.name[11:]) * 86400 + 2e9,) * 2)
    Stage(folder, "train", before=clock_jumps).ends()
    assert_same(folder, projects, POLICY_FILES)


def flip(path: Path, where: float = 0.5) -> None:
    """One bit of a file."""
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
    ("data/train.parquet", other_order, "rows"),
    ("data/train.parquet", another_text, "rows"),
    ("params.yaml", lambda path: change(path.parent, {"engine.max_length": 127}), "max_length"),
    ("params.yaml", lambda path: change(path.parent, {"engine.precision": "bf16"}), "precision"),
    ("params.yaml", lambda path: change(path.parent, {"engine.compile": True}), "compile"),
    ("reference/train/logps.parquet", flip, "logps"),
]
"""What the key of the reference cache holds: a file, what is done to it, and the name that the refusal gives."""


def tampered_by_hand(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Every input of the reference cache, changed behind DVC's back: the stage refuses, and names it."""
    projects.trained(folder)
    for name, tamper, told in TAMPERED:
        tamper(folder / name)
        refused = rf"reference/train: stale reference cache, refused: .*\b{told}\b.* differ"
        Stage(folder, "train").ends(2, refused)
        shutil.copy2(projects.done / name, folder / name)
    Stage(folder, "train", before=another_engine).ends(2, "refused: engine differ")
    (folder / "reference/train/manifest.json").write_text("{")
    Stage(folder, "train").ends(2, "reference/train: no complete reference cache")
    assert not (folder / POLICY).exists()


def tampered_under_dvc(projects: Projects, folder: Path, draw: random.Random) -> None:
    """A bit of every result that later stages read: `dvc repro` makes or fetches it anew."""
    shutil.copytree(projects.done, folder, dirs_exist_ok=True)
    weights = [f"{model}/model.safetensors" for model in ("models/base", REFERENCE, str(POLICY))]
    names = ["data/train.parquet", "data/eval.parquet", "reference/train/logps.parquet", *weights]
    for name in names:
        flip(folder / name, draw.random())
    Repro(folder).ends()
    assert_same(folder, projects)


def dvc(folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run(["dvc", *words], cwd=folder, env=ENV, capture_output=True, text=True, timeout=WAIT)
    return done.returncode, done.stdout + done.stderr


def remote_unreachable(projects: Projects, folder: Path, draw: random.Random) -> None:
    """`dvc push` and `dvc pull` of a remote that is not there; once it is, both work."""
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
    """Two `dvc repro` of one training in one checkout: one trains, the other is refused or has nothing to do."""
    projects.trained(folder)
    runs = [Repro(folder, "--single-item", f"train@{TRIAL}") for _ in range(2)]
    texts = [run.process.communicate(timeout=WAIT)[0] for run in runs]
    codes = [run.process.returncode for run in runs]
    assert 0 in codes, texts
    for code, text in zip(codes, texts, strict=True):
        assert code == 0 or re.search(r"lock|busy", text), text
    assert_same(folder, projects, POLICY_FILES)


def shared_cache(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Two checkouts with one DVC cache run at once."""
    runs = []
    for name in ("one", "other"):
        shutil.copytree(projects.raw, folder / name)
        dvc(folder / name, "cache", "dir", "--local", str(folder / "cache"))
        runs.append(Repro(folder / name, "reference"))
    for run, name in zip(runs, ("one", "other"), strict=True):
        run.ends()
        assert_same(folder / name, projects, ("data/*.parquet", f"{REFERENCE}/*.safetensors", "reference/*/*"))


def not_finite(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Weights with an infinity: the training stops before its first step, names the pairs, saves no policy."""
    projects.trained(folder)
    shutil.rmtree(folder / REFERENCE)
    weights = load_file(folder / "models/base/model.safetensors")
    weights["model.norm.weight"][draw.randrange(32)] = math.inf
    save_file(weights, folder / "models/base/model.safetensors", {"format": "pt"})
    Stage(folder, "sft").ends(1, r"step 1: the loss is nan, from the pairs \S+")
    assert not (folder / REFERENCE).exists()
    assert list((folder / ".training-progress/sft").glob("*/not-finite-step-1-*.json"))


@dataclass(frozen=True)
class TrackAt:
    """Has MLflow's server at this address."""

    url: str

    def __call__(self) -> None:
        os.environ["MLFLOW_TRACKING_URI"] = self.url


def mlflow_down(projects: Projects, folder: Path, draw: random.Random) -> None:
    """MLflow's server is down from the start of a training, then killed in the middle of another; all arrives."""
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
            training.ends()
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
    """Prefect's server is killed while a flow runs a stage: all stages are done, then an error tells of it."""
    shutil.copytree(projects.raw, folder, dirs_exist_ok=True)
    port = str(*free_ports(1))
    env = {**ENV, "PREFECT_HOME": str(folder / ".prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port],
        cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    log = folder / "flow.log"
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api/health"))
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
    assert re.search(r"error: Prefect's server at \S+ is gone .* it goes on from there", log.read_text())
    run = Repro(folder)
    assert not list(run.stages()), run.lines
    run.ends()
    assert_same(folder, projects)


@dataclass(frozen=True)
class Fault:
    """One fault, as the table names it."""

    name: str
    once: Callable[[Projects, Path, random.Random], object]
    lost: str
    """What it costs the user, where it is survived."""
    times: int
    """How often `make faults` does it."""
    tries: int = 1
    """How many faults one time does."""
    quick: bool = False
    """Whether it needs no more than one training, and no DVC."""


STEP = "the step at work"
ROOM = "the stage at work, until there is room"
FAULTS = [
    Fault(
        "`dvc repro` killed, all stages",
        kills_of_repro,
        STEP + " of a training, other stages whole",
        5,
        KILLS_A_RUN,
    ),
    Fault("training killed, `checkpoint_minutes: 0`", kills_of_a_training, STEP, 5, 2, quick=True),
    Fault("training told to end (SIGTERM)", sigterm, "nothing", 5, quick=True),
    Fault("disk full under the checkpoints", disk_full_under_checkpoints, "checkpoints", 3, quick=True),
    Fault("disk full under the policy", disk_full_under_a_training, ROOM, 3, quick=True),
    Fault("disk of the project full", disk_full_anywhere, ROOM, 2),
    Fault("read-only `models/`", read_only_output, "the stage at work", 3, quick=True),
    Fault("out of memory in a step", out_of_memory, "speed", 3, quick=True),
    Fault("clock jumps, checkpoints with wrong times", clock, STEP, 3, quick=True),
    Fault("MLflow's server down", mlflow_down, "nothing", 1, 2),
    Fault("Prefect's server killed in a flow", prefect_down, "the end of the flow run", 1),
    Fault("DVC's remote unreachable", remote_unreachable, "nothing", 1, 2),
    Fault(
        "inputs of the reference cache changed by hand",
        tampered_by_hand,
        "nothing",
        1,
        len(TAMPERED) + 2,
        quick=True,
    ),
    Fault("bits of results flipped, then `dvc repro`", tampered_under_dvc, "what was flipped", 1, 6),
    Fault("two `dvc repro` in one checkout", two_repros, "nothing", 2),
    Fault("two checkouts with one DVC cache at once", shared_cache, "nothing", 1),
    Fault("loss that is no number", not_finite, "nothing", 2, quick=True),
]


def table(results: list[dict[str, object]]) -> str:
    """Results for people."""
    lines = ["| fault | tried | survived | what it costs |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {row['fault']} | {row['tried']} | {row['survived']} | {row['lost']} |" for row in results]
    return "\n".join(lines)


def main() -> None:
    """Do all faults; exit code 1 if one was not survived."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--only", nargs="*", help="functions of this module; the table stays as it is")
    parser.add_argument("--seed", type=int, default=17)
    asked = parser.parse_args()
    draw, results = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as name:
        projects = make_whole(Path(name))
        for fault in FAULTS:
            if asked.only and fault.once.__name__ not in asked.only:
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
                except Untried as untried:
                    tried, lost = 0, f"not tried: {untried}"
                    break
                except Exception:  # noqa: BLE001  # whatever a fault brings about is to be told
                    traceback.print_exc()
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
            results.append({"fault": fault.name, "tried": tried, "survived": survived, "lost": lost})
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if not asked.only:
        write_json(RESULTS, results)
        put_table(PAGE, "faults", table(results))
    sys.exit(any(row["survived"] != row["tried"] for row in results))


if __name__ == "__main__":
    main()
