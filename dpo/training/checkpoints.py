"""Checkpoints of a training run, from which it resumes if it is interrupted.

The name of a run's folder is the hash of everything that determines its result, so a run never finds checkpoints
of another one. A checkpoint is valid if every file has the SHA-256 in `sha256.json`, which is written last.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dpo.common.files import sha256, write_json
from dpo.engine.logprobs import ENGINE_VERSION
from dpo.engine.token_table import TokenTable

CHECKSUMS, NON_FINITE = "sha256.json", "non-finite-"
KEPT = 2
"""Number of checkpoints to keep. The second is used if the last is damaged."""

log = logging.getLogger(__name__)


def training_key(weights: str, rows: TokenTable, settings: Mapping[str, object]) -> str:
    """Return the hash of the initial weights, the rows in their order, the settings and the package versions.

    `weights` is the hash of the files of the initial weights, so that no process needs all weights for the key.
    """
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    facts = {"engine": ENGINE_VERSION, "weights": weights, "rows": rows.digest, **versions, **settings}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()


@dataclass(frozen=True)
class CheckpointStore:
    """Folder for the checkpoints of a run, and the time between two of them."""

    root: Path
    minutes: float
    """Minutes of work that a kill may lose; 0 writes a checkpoint after every step."""

    def folder(self, key: str) -> Path:
        """Return the folder of the run `key`, and remove the folders of other runs."""
        for other in self.root.glob("*"):
            if other.name != key:
                shutil.rmtree(other)
        return self.root / key

    def discard(self) -> None:
        """Remove all files except saved pairs of non-finite steps. Call this when the result is saved."""
        for path in [*sorted(self.root.rglob("*"), reverse=True), self.root]:
            if path.is_dir():
                with suppress(OSError):  # it has saved pairs
                    path.rmdir()
            elif not path.match(f"{NON_FINITE}*"):
                path.unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last valid checkpoint of a run. Remove damaged ones with a warning."""
    for checkpoint in _by_step(folder):
        fault = _fault(checkpoint)
        if fault is None:
            log.warning("%s: training was interrupted; it resumes from this checkpoint", checkpoint)
            return checkpoint
        log.warning("%s: %s; training uses the checkpoint before it", checkpoint, fault)
        shutil.rmtree(checkpoint)
    return None


def write_checksums(checkpoint: Path) -> None:
    """Write the checksums that make a checkpoint valid, then remove old checkpoints."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    write_json(checkpoint / CHECKSUMS, {str(file.relative_to(checkpoint)): sha256(file) for file in files})
    for older in _by_step(checkpoint.parent)[KEPT:]:
        shutil.rmtree(older)


def _by_step(folder: Path) -> list[Path]:
    """Return checkpoints, latest first, by number. File times are wrong if the clock was set back."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _fault(checkpoint: Path) -> str | None:
    try:
        hashes = json.loads((checkpoint / CHECKSUMS).read_text())
        differing = [name for name, value in hashes.items() if sha256(checkpoint / name) != value]
    except (OSError, ValueError) as error:
        return f"incomplete ({error})"
    return f"damaged: {', '.join(differing)}" if differing else None
