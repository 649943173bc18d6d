"""Training steps as MLflow metrics."""

from mlflow.entities import Metric

from tasks.common.training_log import is_recorded
from tasks.tracking.run_logger import RunLogger, step_points
from tasks.tracking.runs import RESUMED


class StepLog:
    """A callback of the training loop that sends log entries to a run, every `STEPS_PER_CALL` steps."""

    STEPS_PER_CALL = 10

    def __init__(self, run_id: str) -> None:
        self.run, self.waiting = RunLogger(run_id), list[Metric]()

    def on_start(self, resumed_step: int, history: list[dict[str, float]]) -> None:
        """Log the entries up to the checkpoint if training resumes from one: its MLflow run is a new one."""
        if resumed_step:
            self.waiting = [point for entry in filter(is_recorded, history) for point in step_points(entry)]
            self.run.set_tag(RESUMED, str(resumed_step))
            self.on_end()

    def on_log(self, entry: dict[str, float]) -> None:
        """Add an entry, which has its number of steps under `step`, if it is recorded."""
        if is_recorded(entry) or "train_runtime" in entry:
            self.waiting += step_points(entry)
        if self.waiting and entry["step"] % self.STEPS_PER_CALL == 0:
            self.on_end()

    def on_end(self) -> None:
        """Send the waiting entries."""
        self.run.log_metrics(self.waiting)
        self.waiting = []
