"""What flows do with git and DVC beside running stages: versions of data and results, their way out and back."""

import subprocess
import threading
from collections.abc import Iterable

from dvc.repo import Repo
from prefect import get_run_logger

from flows.pipeline import TAIL_LINES, StageError, execute


def git(*words: str) -> str:
    """Run git here; return what it prints. Raises StageError with git's own words."""
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(f"git {words[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def module(*command: str) -> list[str]:
    """Run `python -m COMMAND` and log its lines; return them. Raises StageError with the last of them."""
    code, lines = execute(list(command), threading.Event(), get_run_logger())
    if code:
        head, tail = lines[:-TAIL_LINES], lines[-TAIL_LINES:]
        told = [line for line in head if line.startswith("ERROR")]  # DVC names what is wrong, then many files
        raise StageError("\n".join([f"{' '.join(command)} failed; its last output:", *told, *tail]))
    return lines


def dvc(*words: str) -> list[str]:
    """Run DVC, after whoever holds its lock."""
    return module("dvc", "--wait-for-lock", *words)


def default_remote() -> str | None:
    """The name of DVC's default remote."""
    with Repo() as repo:
        name: str | None = repo.config["core"].get("remote")
    return name


def known(paths: Iterable[str], commit: str = "HEAD") -> list[str]:
    """Those of these paths that git holds now or held in a commit."""
    return [path for path in paths if git("ls-files", "--", path) or git("ls-tree", commit, "--", path)]


def commit(message: str, *paths: str) -> bool:
    """Commit these paths and nothing else; whether there was anything to commit."""
    git("add", "--", *paths)
    if not git("diff", "--cached", "--name-only", "--", *paths):
        return False
    git("commit", "--quiet", "--message", message, "--", *paths)
    get_run_logger().info("git: %s", git("log", "-1", "--format=%h %s"))
    return True


def switch(branch: str) -> None:
    """Go to a branch, made from the current one if there is none of that name."""
    if git("branch", "--show-current") != branch:
        git("switch", "--quiet", *([] if git("branch", "--list", branch) else ["--create"]), branch)
