"""The pictures of the README, from the pipeline as it stands: `make images`, after `make repro`."""

import json
import subprocess
import tempfile
from pathlib import Path

from dpo.config import load_params
from tasks.figures import frontier
from tasks.stage import COMPARISON

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Draw the graph of the stages with graphviz, and the frontier of the last comparison in Chromium."""
    dot = subprocess.run(["dvc", "dag", "--dot"], check=True, capture_output=True, text=True).stdout
    subprocess.run(["dot", "-Tsvg", "-o", str(IMAGES / "dag.svg")], input=dot, check=True, text=True)
    policies = json.loads(COMPARISON.read_text())["policies"]
    figure = frontier(load_params().sweep.cells(), policies)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "frontier.html"
        page.write_text(figure.update_layout(width=900, height=520).to_html(config={"displayModeBar": False}))
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        subprocess.run(
            [
                *browser,
                f"--user-data-dir={folder}/profile",
                "--disable-background-networking",
                "--window-size=920,540",
                "--virtual-time-budget=10000",
                f"--screenshot={IMAGES / 'frontier.png'}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )


if __name__ == "__main__":
    main()
