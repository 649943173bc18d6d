"""Git and DVC commands that change files."""

import subprocess

from dvc.repo import Repo
from prefect import get_run_logger

from flows.processes import StageError, run_module


def git(*arguments: str) -> str:
    """Run git and return its output. Raise StageError with git's message if it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"git {arguments[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def dvc(*arguments: str) -> list[str]:
    """Run DVC as soon as no other DVC command holds its lock; return the output lines."""
    return run_module("dvc", "--wait-for-lock", *arguments)


def default_remote() -> str | None:
    """Return the name of DVC's default remote."""
    with Repo() as repo:
        return repo.config["core"].get("remote")


def commit(message: str, *paths: str) -> None:
    """Commit the changes under `paths` and no others. Without changes, do nothing."""
    git("add", "--", *paths)
    if git("diff", "--cached", "--name-only", "--", *paths):
        git("commit", "--quiet", "--message", message, "--", *paths)
        get_run_logger().info("git: %s", git("log", "-1", "--format=%h %s"))
