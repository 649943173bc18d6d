"""Prefect flows. They decide when the stages of `dvc.yaml` run; DVC decides which stages are stale."""

import tasks  # noqa: F401  # first: it disables the telemetry of Prefect and its dependencies
