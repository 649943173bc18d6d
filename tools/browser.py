"""Screenshots with headless Chromium."""

import html
import re
import subprocess
import tempfile
from pathlib import Path


def screenshot(url: str, picture: Path, width: int, height: int) -> str:
    """Save a screenshot of a page and return the text of the page, without text that is drawn in a canvas."""
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
