"""Training steps as MLflow metrics."""

from mlflow.entities import Metric

from tasks.tracking.run_logger import RunLogger, metric_points
from tasks.tracking.runs import RESUMED


class StepLog:
    """A callback of the training loop that sends log entries to a run, every `STEPS_PER_CALL` steps."""

    STEPS_PER_CALL = 10

    def __init__(self, run_id: str) -> None:
        self.run, self.waiting = RunLogger(run_id), list[Metric]()

    def on_start(self, resumed_step: int, history: list[dict[str, float]]) -> None:
        """Log the entries up to the checkpoint if training resumes from one: its MLflow run is a new one."""
        if resumed_step:
            for entry in history:
                self._add(entry)
            self.run.set_tag(RESUMED, str(resumed_step))
            self._send()

    def on_log(self, entry: dict[str, float]) -> None:
        """Add an entry, which has its number of steps under `step`."""
        self._add(entry)
        if entry["step"] % self.STEPS_PER_CALL == 0:
            self._send()

    def on_end(self) -> None:
        """Send the remaining entries."""
        self._send()

    def _add(self, entry: dict[str, float]) -> None:
        named = {f"train/{name}": value for name, value in entry.items() if name != "step"}
        self.waiting += metric_points(named, int(entry["step"]))

    def _send(self) -> None:
        self.run.log_metrics(self.waiting)
        self.waiting = []
