"""Screenshots with headless Chromium."""

import html
import re
import subprocess
import tempfile
from pathlib import Path


def screenshot(url: str, picture: Path, width: int, height: int) -> str:
    """Save a screenshot of a page and return the text of the page, without text that is drawn in a canvas."""
    page = dom(url, f"--window-size={width},{height}", f"--screenshot={picture}")
    visible = re.sub(r"<(script|style)\b.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(visible).split())


def dom(url: str, *options: str) -> str:
    """Return the HTML of a page after its scripts have run."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--disable-background-networking", f"--user-data-dir={profile}", *options]
        command += ["--force-prefers-reduced-motion", "--run-all-compositor-stages-before-draw"]
        command += ["--virtual-time-budget=20000", "--dump-dom", url]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
