"""All faults, how often they are injected, and what the user loses."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.faults.inputs import TAMPERED, not_finite, tampered_by_hand, tampered_under_dvc
from tests.support.faults.machine import (
    KILLS_PER_RUN,
    clock,
    disk_full_anywhere,
    disk_full_under_a_training,
    disk_full_under_checkpoints,
    kills_of_a_training,
    kills_of_repro,
    out_of_memory,
    read_only_output,
    sigterm,
)
from tests.support.faults.projects import Projects
from tests.support.faults.services import mlflow_down, prefect_down, remote_unreachable, shared_cache, two_repros


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
