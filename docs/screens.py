"""Pictures of Prefect's pages, after a run of the pipeline: `python -m docs.screens [--output FOLDER]`.

The server is that of PREFECT_API_URL, or else the one of `make up`. Needs Chromium.
"""

import argparse
import os
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort

from docs.browser import photograph

IMAGES = Path(__file__).parent / "images"
COMPLETED = [StateType.COMPLETED]
API = "http://127.0.0.1:4200/api"


def pages(api: str) -> dict[str, str]:
    """By the name of its picture the address of each page: the pipeline's latest run, a form, the artifacts."""
    site = api.removesuffix("/api")
    with SyncPrefectClient(api) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["pipeline"])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=COMPLETED))),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
        form = client.read_deployment_by_name("sweep/sweep")
    return {
        "run": f"{site}/runs/flow-run/{runs[0].id}",
        "form": f"{site}/deployments/deployment/{form.id}/run",
        "artifacts": f"{site}/artifacts",
    }


def main() -> None:
    """Take each picture."""
    parser = argparse.ArgumentParser(prog="python -m docs.screens", description=__doc__)
    parser.add_argument("--output", type=Path, default=IMAGES)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, url in pages(os.environ.get("PREFECT_API_URL", API)).items():
        photograph(url, folder / f"prefect-{name}.png", 1280, 900)


if __name__ == "__main__":
    main()
