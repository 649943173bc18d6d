"""The list of sweeps in MLflow: each name has date, commit, the gate's verdict, and whether the sweep serves."""

from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from tasks.tracking import champions, registry
from tasks.tracking.offline import ROLE, search


def record_decision(run_id: str, decision: str, reason: str) -> None:
    """Tag a policy's run and its sweep with the gate's decision, then name all sweeps."""
    client = MlflowClient()
    sweep = client.get_run(run_id).data.tags.get(MLFLOW_PARENT_RUN_ID)
    for run in (run_id, sweep) if sweep else (run_id,):
        client.set_tag(run, registry.DECISION, decision)
        client.set_tag(run, registry.REASON, reason)
    name_sweeps()


def name_sweeps() -> None:
    """Rename the sweeps whose verdict changed, and those that serve now or no longer do."""
    client, champion = MlflowClient(), registry.champion()
    serving = None
    if champion and (policy := search(client, f"attributes.run_id = '{champion.tags.get(champions.RUN, '')}'")):
        serving = policy[0].data.tags.get(MLFLOW_PARENT_RUN_ID)
    for sweep in search(client, f"tags.`{ROLE}` = 'sweep'"):
        verdict = sweep.data.tags.get(registry.DECISION, "")
        if champion and sweep.info.run_id == serving:
            verdict = f"{verdict}, serves as version {champion.version}".removeprefix(", ")
        name = sweep_name(sweep) + (f": {verdict}" if verdict else "")
        if name != sweep.info.run_name:
            client.update_run(sweep.info.run_id, name=name)


def sweep_name(sweep: Run) -> str:
    """Return the name of a sweep without a verdict: its date in UTC and its commit."""
    started = datetime.fromtimestamp(sweep.info.start_time / 1000, UTC)
    return f"sweep {started:%Y-%m-%d %H:%M} {sweep.data.tags.get('git_commit', 'none')[:7]}"
