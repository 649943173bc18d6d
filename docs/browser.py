"""Chromium without a window."""

import subprocess
import tempfile
from pathlib import Path


def photograph(url: str, picture: Path, width: int, height: int) -> None:
    """Let Chromium open a page and save what it shows."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ]
        command += ["--force-prefers-reduced-motion", "--run-all-compositor-stages-before-draw"]
        command += ["--virtual-time-budget=20000", f"--screenshot={picture}", url]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
