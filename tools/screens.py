"""Take screenshots of Prefect and MLflow after a pipeline run: `python -m tools.screens [--output FOLDER]`.

Uses the servers of PREFECT_API_URL and MLFLOW_TRACKING_URI, else those of `make up`. Needs Chromium.
"""

import argparse
import os
from pathlib import Path

from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterType,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort

from tasks.tracking.offline import ROLE, SWEEP
from tasks.tracking.runs import frontier_path
from tools.browser import screenshot

IMAGES = Path("docs/images")
COMPLETED = [StateType.COMPLETED]
API = "http://127.0.0.1:4200/api"
MLFLOW = "http://127.0.0.1:5000"


def prefect_pages(api: str) -> dict[str, str]:
    """Return the addresses of the latest run, its page of `compare`, all artifacts and a form, by image name."""
    site = api.removesuffix("/api")
    with SyncPrefectClient(api) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["pipeline"])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=COMPLETED))),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
        written = ArtifactFilter(type=ArtifactFilterType(any_=["markdown"]))
        pages = client.read_artifacts(artifact_filter=written, sort=ArtifactSort.CREATED_DESC)
        compared = next(page for page in pages if str(page.key).endswith("compare"))
        (form,) = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=["sweep"])), limit=1)
    return {
        "prefect-run": f"{site}/runs/flow-run/{runs[0].id}",
        "prefect-stage": f"{site}/artifacts/artifact/{compared.id}",
        "prefect-artifacts": f"{site}/artifacts",
        "prefect-form": f"{site}/deployments/deployment/{form.id}/run",
    }


def mlflow_pages(site: str) -> dict[str, str]:
    """Return the address of the latest sweep's chart of reward against KL, by image name."""
    client = MlflowClient(site)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    latest, *_ = client.search_runs(experiments, f"tags.`{ROLE}` = 'policy'")
    path = frontier_path(latest.data.tags[SWEEP])
    return {"mlflow-frontier": f"{site}/#/experiments/{latest.info.experiment_id}/{path}"}


def main() -> None:
    """Take each screenshot."""
    parser = argparse.ArgumentParser(prog="python -m tools.screens", description=__doc__)
    parser.add_argument("--output", type=Path, default=IMAGES)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, url in prefect_pages(os.environ.get("PREFECT_API_URL", API)).items():
        screenshot(url, folder / f"{name}.png", 1280, 900)
    for name, url in mlflow_pages(os.environ.get("MLFLOW_TRACKING_URI", MLFLOW)).items():
        screenshot(url, folder / f"{name}.png", 1600, 1000)


if __name__ == "__main__":
    main()
