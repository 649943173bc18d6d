"""Chromium without a window."""

import html
import re
import subprocess
import tempfile
from pathlib import Path


def photograph(url: str, picture: Path, width: int, height: int) -> str:
    """Let Chromium open a page and save what it shows; the words of the page, but those drawn in a canvas."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            "--disable-background-networking",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ]
        command += ["--force-prefers-reduced-motion", "--run-all-compositor-stages-before-draw"]
        command += ["--virtual-time-budget=20000", f"--screenshot={picture}", "--dump-dom", url]
        page = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    visible = re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(visible).split())
