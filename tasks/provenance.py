"""What made a result: code, data, models, packages, machine."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from dpo.files import md5, sha256
from tasks.stage import BASE, EVAL, TRAIN

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "dvc", "mlflow", "prefect")


def commit() -> tuple[str, bool]:
    """Git's commit (`none` outside a repository) and whether tracked files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") or "none", bool(git("status", "--porcelain", "--untracked-files=no"))


def weights(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights."""
    return sha256(*sorted(folder.glob("*.safetensors")))


def provenance(checkpoints: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Groups of facts about checkpoints trained here, ready to be shown."""
    import torch  # here, so that stages which only ask for the commit start without it

    revision, dirty = commit()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {
        "code": {"git commit": revision + (" and changes since" if dirty else "")},
        "data (MD5, as in dvc.lock)": {str(path): md5(path) for path in (TRAIN, EVAL)},
        "weights (SHA-256)": {str(path): weights(path) for path in (BASE, *checkpoints)},
        "packages": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": {"system": platform.platform(), "processor": machine},
    }
