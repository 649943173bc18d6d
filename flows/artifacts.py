"""What Prefect's pages show of a stage: how far a long one is, and what each one left.

Which figures and plots a stage leaves is read from DVC, so that a new stage needs nothing here. Pages are for
people: where Prefect's server or MLflow cannot be reached, the stage goes on without.
"""

import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
from dvc.output import Output
from dvc.repo import Repo
from matplotlib.figure import Figure
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from dpo.common.files import PROVENANCE
from tasks.common.flatten import flatten
from tasks.common.paths import REPORTS

BAR = re.compile(r" *(?:(.*?): +)?(\d+)%\|.*\| *(\S+/\S+) \[([\d:]+)<([\d:?]+)")
"""A bar of tqdm: its title, percent, steps done and in all, time so far, time left."""
BAR_SECONDS = 10.0
MLFLOW_PAGES = "DPO_MLFLOW_PAGES"
"""Environment variable with the address of MLflow's pages, where MLFLOW_TRACKING_URI is none."""
TABLE_ROWS, PANELS_A_ROW = 10, 3
SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Of a table, by the ending of its name."""


@contextmanager
def if_there() -> Iterator[None]:
    """Ask Prefect's server for what is for people alone: if it does not answer within seconds, go on without."""
    with suppress(httpx.HTTPError), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
        yield


def key(stage: str) -> str:
    """A stage's name as Prefect wants it of an artifact."""
    return re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")


class Progress:
    """How far a stage is, as an artifact; made once a bar has run for `BAR_SECONDS`, so short stages have none."""

    def __init__(self, stage: str) -> None:
        self.stage, self.percent = stage, 0.0
        self.artifact: Any = None

    def show(self, line: str) -> None:
        """Take up the state of a bar; any other line changes nothing."""
        bar = BAR.match(line)
        if bar is None:
            return
        title, percent, steps, so_far, left = bar.groups()
        if self.artifact or _seconds(so_far) >= BAR_SECONDS:
            self.percent = float(percent)
            self._put(f"{title + ': ' if title else ''}{steps}, {left} left")

    def end(self, verdict: str, complete: bool) -> None:
        """The stage ended, at 100 if it is complete, else where it was."""
        if self.artifact:
            self.percent = 100.0 if complete else self.percent
            self._put(verdict)

    def _put(self, words: str) -> None:
        with if_there():
            if self.artifact:
                update_progress_artifact(self.artifact, self.percent, words)
            else:
                self.artifact = create_progress_artifact(self.percent, f"{key(self.stage)}-progress", words)


def show_stage(stage: str, verdict: str, seconds: float, complete: bool) -> None:
    """Make an artifact of what a stage left: its MLflow run, its page `reports/STAGE.md`, its metrics and plots.

    Of a stage that is not complete only the page is shown.
    """
    outs = outputs(stage) if complete else {}
    ended = f"{verdict} in {seconds:.0f} s" if complete else verdict
    parts = [f"## `{stage}`: {ended}"]
    parts += [f"MLflow: {mlflow_run(path / PROVENANCE)}" for path in outs if (path / PROVENANCE).is_file()]
    page = REPORTS / f"{stage}.md"
    parts += [page.read_text().strip()] if page.is_file() else []
    for path, out in outs.items():
        if (out.metric or out.plot) and path.is_file():
            parts += [f"### {path}", *plotted(path, out.plot), figures(path)]
    with if_there():
        create_markdown_artifact("\n\n".join(parts), key=key(stage), description=ended)


def outputs(stage: str) -> dict[Path, Output]:
    """What a stage leaves, by DVC."""
    with Repo() as repo:
        outs = [out for found in repo.stage.collect(stage) for out in found.outs]
        return {Path(os.path.relpath(out.fs_path)): out for out in outs}


def mlflow_run(provenance: Path) -> str:
    """The MLflow run that a checkpoint came from; a link, where a server shows it."""
    run: str = json.loads(provenance.read_text())["mlflow_run"]
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    site = store if store.startswith(("http://", "https://")) else os.environ.get(MLFLOW_PAGES)
    if site is None:
        return f"run `{run}`"
    site = site.rstrip("/")
    try:
        answer = httpx.get(f"{site}/api/2.0/mlflow/runs/get", params={"run_id": run}).raise_for_status().json()
    except httpx.HTTPError:
        return f"run `{run}`"
    return f"[run {run}]({site}/#/experiments/{answer['run']['info']['experiment_id']}/runs/{run})"


def figures(path: Path) -> str:
    """A file of figures as a table in Markdown; of a long one rows spread evenly, with the last."""
    try:
        if path.suffix == ".json":
            rows = [(".".join(names), value) for names, value in flatten(json.loads(path.read_text()))]
            return _markdown(pd.DataFrame(rows, columns=["figure", "value"], dtype=object))
        if path.suffix in SEPARATORS:
            table = _table(path)
            shown = sorted({round(k * (len(table) - 1) / (TABLE_ROWS - 1)) for k in range(TABLE_ROWS)})
            return _markdown(table if len(table) <= TABLE_ROWS else table.iloc[shown])
    except ValueError as error:
        return f"not readable: {error}"
    return f"{path.stat().st_size} bytes"


def plotted(path: Path, plot: Any) -> list[str]:
    """A table as a picture in Markdown, one panel for each column of numbers; none where nothing can be drawn.

    Args:
        path: the table.
        plot: what DVC knows of it as a plot: the column `x`, by default the row; with the template `scatter` only
            the column `y` is drawn, in points.
    """
    settings = plot if isinstance(plot, dict) else {}
    x, points = settings.get("x"), settings.get("template") == "scatter"
    try:
        table = _table(path).select_dtypes("number") if plot and path.suffix in SEPARATORS else pd.DataFrame()
    except ValueError:
        return []
    names = [name for name in table if name != x and (not points or name == settings.get("y"))]
    if not names or table.empty:
        return []
    columns = min(len(names), PANELS_A_ROW)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.75 * columns, 2.5 * rows), dpi=72, layout="constrained")
    for number, name in enumerate(names, 1):
        panel = figure.add_subplot(rows, columns, number)
        panel.plot(table.get(x, table.index), table[name], "o" if points else "-")
        panel.set_title(str(name), fontsize="small")
        panel.set_xlabel(x or "row", fontsize="small")
        panel.tick_params(labelsize="small")
    picture = BytesIO()
    figure.savefig(picture, format="webp", pil_kwargs={"lossless": True})
    return [f"![{path}](data:image/webp;base64,{b64encode(picture.getvalue()).decode()})"]


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep=SEPARATORS[path.suffix])


def _markdown(table: pd.DataFrame) -> str:
    rows = [table.columns.tolist(), ["---"] * len(table.columns), *table.to_numpy(dtype=object).tolist()]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_cell, value))}]"
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def _seconds(clock: str) -> int:
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return total
