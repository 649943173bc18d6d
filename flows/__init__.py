"""The Prefect flows: they decide when the stages of `dvc.yaml` run, never what is stale."""

import tasks  # noqa: F401  # before prefect is imported: no dependency reports usage
