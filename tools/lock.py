"""Lock the dependencies of `pyproject.toml` by version and SHA-256: `make lock`; UPGRADE=1 takes newer versions.

Writes `requirements/build.txt`, `torch.txt`, `runtime.txt` and `dev.txt` for Python 3.11 to 3.13 on Linux and
macOS. Each package is in one of these files. `torch-cpu.txt` is maintained by hand.
"""

import argparse
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

FOLDER = Path("requirements")
KINDS = ("build", "torch", "runtime", "dev")
HEADER = "# Written by `make lock`.\n"
BUILD = ("setuptools",)
"""Packages that build this project and the dependencies without a wheel."""

UNLOCKED = ("reasoning", "wandb")
"""Extras that are not locked: a dependency of `reasoning` has no wheel and needs a C compiler, and `wandb` needs
pre-releases of other packages."""

TORCH = ("torch", "triton", "nvidia-", "cuda-")
"""Prefixes of torch and the CUDA runtime that it needs on Linux."""


def main() -> None:
    """Resolve with and without the development tools and write the files."""
    parser = argparse.ArgumentParser(prog="python -m tools.lock", description="Lock the dependencies.")
    parser.add_argument(
        "--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows"
    )
    held = "" if parser.parse_args().upgrade else "".join((FOLDER / f"{kind}.txt").read_text() for kind in KINDS)
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    everything = resolve(held, *(f"--extra={name}" for name in extras if name not in UNLOCKED))
    runtime = resolve("".join(everything.values()))
    files: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name, entry in everything.items():
        kind = "build" if name in BUILD else "torch" if name.startswith(TORCH) else None
        files[kind or ("runtime" if name in runtime else "dev")].append(entry)
    FOLDER.mkdir(exist_ok=True)
    for kind, entries in files.items():
        (FOLDER / f"{kind}.txt").write_text(HEADER + "".join(entries))


def resolve(held: str, *options: str) -> dict[str, str]:
    """Return the entries of the lock by package: version, marker, one line per hash.

    Args:
        held: entries whose versions are kept.
        options: options of uv.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write(held)
        pins.flush()
        command = ["uv", "pip", "compile", "pyproject.toml", "--constraint", pins.name, "--universal"]
        command += ["--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
        lock = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
    entries: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", lock.strip()):
        name = entry.split("==")[0]
        entries[name] = f"{entries.get(name, '')}{entry}\n"
    return entries


if __name__ == "__main__":
    main()
