"""Read commits and changes from git. `flows/git.py` adds the commands that write."""

import subprocess
from pathlib import Path

from dpo.common.errors import InputError


def head_commit() -> str:
    """Return the hash of the current commit, or `none` outside a repository."""
    return _git("rev-parse", "HEAD").stdout.strip() or "none"


def inputs_changed() -> bool:
    """Return whether tracked files other than results differ from the current commit."""
    status = ["status", "--porcelain", "--untracked-files=no", "--"]
    return bool(_git(*status, ".", ":!dvc.lock", ":!metrics", ":!*.gitignore").stdout.strip())


def uncommitted(*paths: str) -> list[str]:
    """Return the tracked files, or all files in `paths`, that differ from HEAD; InputError without a commit."""
    status = _git("status", "--porcelain", f"--untracked-files={'all' if paths else 'no'}", "--", *paths)
    if status.returncode or _git("rev-parse", "--verify", "HEAD").returncode:
        raise InputError("git: this folder has no commit, so a rollback has no target; run `git init` and commit")
    return [line[3:] for line in status.stdout.splitlines()]


def committed_file(path: Path) -> bytes | None:
    """Return a file's content in the current commit, or None if git or the commit does not have it."""
    try:
        return subprocess.run(["git", "show", f"HEAD:./{path}"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def experiment_file(name: str, path: Path) -> str:
    """Return the text of a file in an experiment of DVC; InputError if there is no such experiment or file."""
    refs = _git("for-each-ref", "--sort=-creatordate", "--format=%(refname)", "refs/exps").stdout.split()
    found = [ref for ref in refs if ref.split("/")[-1] == name and ref.count("/") == 4]
    shown = _git("show", f"{found[0]}:./{path}") if found else None
    if shown is None or shown.returncode:
        raise InputError(f"{name}: no experiment of DVC with this name has {path}; see `dvc exp list`")
    return shown.stdout


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=False)
