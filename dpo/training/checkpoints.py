"""What a training has done so far, kept on disk so that one that was killed goes on where it stopped.

The folder of a training is named by the hash of everything that decides its result, so it can find no checkpoints
but its own. A checkpoint counts only if every file of it has the hash that was written down last.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedModel

from dpo.common.files import sha256, write_json
from dpo.engine.logprobs import ENGINE_VERSION
from dpo.engine.packing import TokenRow

SEAL, REPLAY = "sha256.json", "not-finite-"
KEPT = 2
"""Checkpoints that stay: the last, and the one before in case the last is damaged."""

log = logging.getLogger(__name__)


def training_key(model: PreTrainedModel, rows: Sequence[TokenRow], settings: Mapping[str, object]) -> str:
    """Hash of the start weights, the rows in their order, the settings and the versions that compute with them."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().numpy().data)
    for row in rows:
        digest.update(row.digest)
    versions = {"engine": ENGINE_VERSION} | {
        name: version(name) for name in ("torch", "transformers", "accelerate")
    }
    digest.update(json.dumps({**versions, **settings}, sort_keys=True, default=dataclasses.asdict).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Progress:
    """Where a training keeps its checkpoints, and how often it writes one."""

    root: Path
    minutes: float
    """Work that a kill may undo; 0 writes a checkpoint after every step."""

    def folder(self, key: str) -> Path:
        """The folder of the training `key`; what another training left under `root` is removed."""
        for other in self.root.glob("*"):
            if other.name != key:
                shutil.rmtree(other)
        return self.root / key

    def discard(self) -> None:
        """Remove what is no longer needed once the result is safe, all but pairs whose loss was no number."""
        for path in sorted(self.root.rglob("*"), reverse=True):
            if not path.match(f"{REPLAY}*"):
                path.unlink() if path.is_file() else _remove_empty(path)
        _remove_empty(self.root)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a training, told in the log; damaged ones are removed with a warning."""
    for checkpoint in _by_step(folder):
        fault = _fault(checkpoint)
        if fault is None:
            log.warning("%s: this training was cut off before; it goes on from here", checkpoint)
            return checkpoint
        log.warning("%s: %s; it is left out, training goes on from the one before", checkpoint, fault)
        shutil.rmtree(checkpoint)
    return None


def seal(checkpoint: Path) -> None:
    """Write down that a checkpoint is whole, then remove those that are no longer needed."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    write_json(checkpoint / SEAL, {str(file.relative_to(checkpoint)): sha256(file) for file in files})
    for older in _by_step(checkpoint.parent)[KEPT:]:
        shutil.rmtree(older)


def _by_step(folder: Path) -> list[Path]:
    """Latest first, by their numbers: times of files are worth nothing once a clock was set back."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _fault(checkpoint: Path) -> str | None:
    try:
        hashes = json.loads((checkpoint / SEAL).read_text())
        differing = [name for name, value in hashes.items() if sha256(checkpoint / name) != value]
    except (OSError, ValueError) as error:
        return f"not whole ({error})"
    return f"damaged: {', '.join(differing)}" if differing else None
