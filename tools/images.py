"""Make the images of the README from the current pipeline: `make images`, after `make repro`."""

import json
import subprocess
import tempfile
from pathlib import Path

import pandas as pd

from dpo.config import load_params
from tasks.common.paths import COMPARISON, METRICS
from tasks.report.figures import frontier
from tools.browser import screenshot

IMAGES = Path("docs/images")


def main() -> None:
    """Draw the graph of the stages with graphviz and the frontier of the last comparison with Chromium."""
    dot = subprocess.run(["dvc", "dag", "--dot"], check=True, capture_output=True, text=True).stdout
    subprocess.run(["dot", "-Tsvg", "-o", str(IMAGES / "dag.svg")], input=dot, check=True, text=True)
    policies = json.loads(COMPARISON.read_text())["policies"]
    points = pd.read_csv(METRICS / "frontier.csv").dropna(subset="yardstick")
    params = load_params()
    judges = params.evaluate.judges
    figure = frontier(params.trials(), policies, points, judges[0].name if judges else None)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "frontier.html"
        page.write_text(figure.update_layout(width=900, height=520).to_html(config={"displayModeBar": False}))
        screenshot(page.as_uri(), IMAGES / "frontier.png", 920, 540)


if __name__ == "__main__":
    main()
