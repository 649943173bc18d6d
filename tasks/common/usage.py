"""What the training of a policy costs: tokens, FLOPs, minutes and peak memory."""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dpo.common.files import write_json
from dpo.engine.flops import Cost
from dpo.training.callbacks import Callback
from tasks.common.paths import TRAINING_PROGRESS


class Usage(Callback):
    """Measures minutes and peak memory of the main process, from its creation on.

    If the training resumes, the minutes and memory of interrupted runs count, up to the last step of each.
    """

    def __init__(self, name: str) -> None:
        self.file, self.started = TRAINING_PROGRESS / f"{name}.usage.json", time.monotonic()
        self.earlier = {"minutes": 0.0, "peak_memory_gib": 0.0}
        self.is_first = True

    def on_start(self, resumed_step: int, history: list[dict[str, float]]) -> None:
        """Read the usage of interrupted runs if the training resumes."""
        if self.is_first and resumed_step and self.file.is_file():
            self.earlier = json.loads(self.file.read_text())
        self.is_first = False

    def on_log(self, entry: dict[str, float]) -> None:
        """Save the usage for a run that resumes."""
        write_json(self.file, self.measured())

    def measured(self) -> dict[str, float]:
        """Return the minutes and the peak memory up to now."""
        minutes = self.earlier["minutes"] + (time.monotonic() - self.started) / 60
        return {"minutes": minutes, "peak_memory_gib": max(self.earlier["peak_memory_gib"], _peak_bytes() / 2**30)}

    def write(self, path: Path, cost: Cost, counts: Mapping[str, int]) -> None:
        """Write the cost of a finished training as JSON, with further counts."""
        write_json(path, {**counts, **asdict(cost), **self.measured()})
        self.file.unlink(missing_ok=True)


def trained_cost(log: Sequence[Mapping[str, float]]) -> Cost:
    """Return the cost of the steps in the log of a training."""
    flops = [entry.get("flops") for entry in log]
    known = None if None in flops else float(sum(filter(None, flops)))
    return Cost(trained_tokens=int(sum(entry["tokens"] for entry in log)), flops=known)


def _peak_bytes() -> int:
    """Return the peak memory of the GPU, or of the process on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
