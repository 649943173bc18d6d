"""Faults of the machine: kills, full and read-only disks, too little memory, a wrong clock."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tasks.common import paths
from tests.support.faults.projects import (
    POLICY,
    POLICY_FILES,
    NotSupported,
    Projects,
    Repro,
    Stage,
    assert_same,
    dvc,
    memory,
)
from tests.support.project import TRIAL, change

KILLS_PER_RUN = 10


def kills_of_repro(projects: Projects, folder: Path, draw: random.Random) -> None:
    """Send SIGKILL to `dvc repro` and its stages at random times of every stage; the next run completes.

    If DVC is killed while it writes its lock, the file is deleted as docs/operations/faults.md says.
    """
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
                delete_damaged_lock(folder)
                break
        assert killed or run.process.wait() == 0, "".join(run.lines)[-3000:]
    Repro(folder).wait()
    assert_same(folder, projects)
    assert "up to date" in dvc(folder, "status")[1]


def delete_damaged_lock(folder: Path) -> None:
    """Delete DVC's file of locks if a kill left a part of it."""
    lock = folder / ".dvc/tmp/rwlock"
    try:
        json.loads(lock.read_text() if lock.exists() else "{}")
    except ValueError:
        print(f"killed while DVC wrote {lock.name}")
        lock.unlink()


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
