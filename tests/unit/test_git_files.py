"""Git settings that keep a clone usable on every system."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def git(*words, cwd):
    return subprocess.run(["git", *words], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_text_files_have_unix_line_ends_on_every_system(tmp_path):
    for name in (".gitattributes", "dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    git("init", "-q", cwd=tmp_path)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    git("add", "-A", cwd=tmp_path)
    git(*identity, "commit", "-qm", "start", cwd=tmp_path)
    git("config", "core.autocrlf", "true", cwd=tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).unlink()
    git("checkout", "--", ".", cwd=tmp_path)
    for name in ("dvc.yaml", "params.yaml"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()


def test_an_environment_is_ignored_as_a_folder_and_as_a_symbolic_link(tmp_path):
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    git("init", "-q", cwd=tmp_path)
    (tmp_path / ".venv").symlink_to(tmp_path.parent)
    assert ".venv" not in git("status", "--short", cwd=tmp_path)
