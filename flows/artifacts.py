"""Prefect artifacts of a stage: its progress while it runs, and its metrics and plots when it has ended.

DVC names the metrics and plots of a stage, so a new stage needs no code here. Artifacts are informative: if
Prefect's server or MLflow cannot be reached, the stage continues without them.
"""

import json
import os
import re
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from dpo.common.errors import InputError, TransientError
from dpo.common.files import PROVENANCE
from flows.git import open_repo
from flows.identity import project
from flows.processes import StageError
from tasks.common.addresses import mlflow_site, shown, without_credentials
from tasks.common.flatten import flatten
from tasks.common.markdown import block, inline
from tasks.common.paths import REPORTS

if TYPE_CHECKING:
    import pandas as pd

PROGRESS_SECONDS = 10.0  # shortest duration of a bar that gets an artifact, and time between two updates
MAX_ROWS = 10
SEPARATORS = {".csv": ",", ".tsv": "\t"}


@contextmanager
def ignore_outage() -> Iterator[None]:
    """Retry requests to Prefect's server once only, and continue if the server does not answer."""
    with suppress(httpx.HTTPError), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
        yield


def artifact_key(stage: str) -> str:
    """Return the key of an artifact: the checkout's name and that of the stage, in Prefect's form of keys."""
    return re.sub(r"[^a-z0-9]+", "-", f"{project()}-{stage}".lower()).strip("-")


class ProgressArtifact:
    """Progress of a running stage, from the file of `dpo.common.progress`. Short stages have no artifact."""

    def __init__(self, stage: str, file: Path) -> None:
        self.stage, self.file = stage, file
        self.percent, self.next_update = 0.0, 0.0
        self.artifact: Any = None

    def update(self) -> None:
        """Show the state in the file, at most every `PROGRESS_SECONDS`."""
        if time.monotonic() < self.next_update or not self.file.exists():
            return
        state = json.loads(self.file.read_text())
        if self.artifact or state["elapsed_s"] >= PROGRESS_SECONDS:
            self.percent = 100.0 * state["done"] / state["total"] if state["total"] else 0.0
            self._publish(describe(state))
            self.next_update = time.monotonic() + PROGRESS_SECONDS

    def end(self, verdict: str, complete: bool) -> None:
        """Show how the stage ended, at 100 percent if it is complete, else at the last percentage."""
        self.next_update = 0.0
        self.update()
        if self.artifact:
            self.percent = 100.0 if complete else self.percent
            self._publish(verdict)

    def _publish(self, description: str) -> None:
        with ignore_outage():
            if self.artifact:
                update_progress_artifact(self.artifact, self.percent, description)
            else:
                key = artifact_key(f"{self.stage}-progress")
                self.artifact = create_progress_artifact(self.percent, key, description)


def describe(state: dict[str, Any]) -> str:
    """Return the state of a progress bar as text, for example `tokens: 30 of 40, 0:01:12 left`."""
    title = f"{state['title']}: " if state["title"] else ""
    total = f" of {state['total']:,}" if state["total"] else ""
    seconds = state["remaining_s"]
    left = "" if seconds is None else f", {timedelta(seconds=round(seconds))} left"
    return f"{title}{state['done']:,}{total}{left}"


def publish_stage(stage: str, verdict: str, seconds: float, complete: bool) -> None:
    """Publish a stage's page `reports/STAGE.md` and, if it is complete, its MLflow run, metrics and plots."""
    outs, ended = {}, verdict
    if complete:
        ended = f"{verdict} in {seconds:.0f} s"
        with open_repo() as repo:
            found = [out for single in repo.stage.collect(stage) for out in single.outs]
            outs = {Path(os.path.relpath(out.fs_path)): out for out in found}
    parts = [f"## `{stage}`: {ended}"]
    parts += [f"MLflow: {mlflow_link(path / PROVENANCE)}" for path in outs if (path / PROVENANCE).is_file()]
    page = REPORTS / f"{stage}.md"
    parts += [page.read_text().strip()] if page.is_file() else []
    for path, out in outs.items():
        own = f"{path.with_suffix('')}/".startswith(f"metrics/{stage.split('@')[0]}/")
        if (out.metric or out.plot or own) and path.is_file():
            parts += [f"### {path}", *plot_images(path, out.plot), file_table(path)]
    with ignore_outage():
        create_markdown_artifact("\n\n".join(parts), key=artifact_key(stage), description=ended)


@contextmanager
def failure_page(title: str) -> Iterator[None]:
    """If the block fails, publish a page that says what failed, why, and what to do."""
    try:
        yield
    except Exception as error:
        what, _, rest = without_credentials(str(error)).partition("\n")
        lines = [f"## {title} failed", f"**What failed:** {inline(what or type(error).__name__)}"]
        lines += [f"**Why:**\n\n{block(rest)}"] if rest else []
        lines.append(f"**What to do:** {_advice(error)}")
        with ignore_outage():
            create_markdown_artifact(
                "\n\n".join(lines), key=artifact_key("failure"), description=f"{title} failed"
            )
        raise


def _advice(error: Exception) -> str:
    if isinstance(error, InputError):
        return "Change what the message names, then start the run again. Nothing was changed."
    if isinstance(error, TransientError) or getattr(error, "transient", False):
        return "The fault may disappear: the next run tries again. If it repeats, check network and servers."
    if isinstance(error, StageError):
        return "The lines above have the reason. Remove it, then start the run again: completed stages are kept."
    return "This error is not expected. The log of the run has its traceback; start the run again after a fix."


def mlflow_link(provenance: Path) -> str:
    """Return the MLflow run that made a checkpoint: a link if an MLflow server has the run, else its id."""
    run = json.loads(provenance.read_text())["mlflow_run"]
    site = mlflow_site()  # if it is empty, the request raises UnsupportedProtocol
    try:
        answer = httpx.get(f"{site}/api/2.0/mlflow/runs/get", params={"run_id": run}).raise_for_status().json()
    except httpx.HTTPError:
        return f"run `{run}`"
    return f"[run {run}]({shown(site)}/#/experiments/{answer['run']['info']['experiment_id']}/runs/{run})"


def file_table(path: Path) -> str:
    """Return a metrics or plot file as a Markdown table of at most `MAX_ROWS` evenly spaced rows."""
    import pandas as pd

    try:
        if path.suffix == ".json":
            rows = [(".".join(names), value) for names, value in flatten(json.loads(path.read_text()))]
            return _markdown(pd.DataFrame(rows, columns=["figure", "value"], dtype=object))
        if path.suffix in SEPARATORS:
            table = pd.read_csv(path, sep=SEPARATORS[path.suffix])
            shown = [round(k * (len(table) - 1) / (MAX_ROWS - 1)) for k in range(MAX_ROWS)]
            return _markdown(table if len(table) <= MAX_ROWS else table.iloc[shown])
    except ValueError as error:
        return f"not readable: {inline(str(error))}"
    return f"{path.stat().st_size} bytes"


def plot_images(path: Path, plot: Any) -> list[str]:
    """Return a plot file as one Markdown image with a panel per numeric column; nothing if it has no numbers.

    `plot` has DVC's plot settings: the column `x`, by default the row number; with the template `scatter` only the
    column `y` is drawn, as points.
    """
    if not plot or path.suffix not in SEPARATORS:
        return []
    import pandas as pd
    from matplotlib.figure import Figure

    try:
        table = pd.read_csv(path, sep=SEPARATORS[path.suffix]).select_dtypes("number")
    except ValueError:
        return []
    settings = plot if isinstance(plot, dict) else {}
    x, points = settings.get("x"), settings.get("template") == "scatter"
    names = [name for name in table if name != x and (not points or name == settings.get("y"))]
    if not names or table.empty:
        return []
    columns = min(len(names), 3)
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


def _markdown(table: "pd.DataFrame") -> str:
    rows = [table.columns.tolist(), ["---"] * len(table.columns), *table.to_numpy(dtype=object).tolist()]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_cell, value))}]"
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else inline(str(value))
