"""Callbacks of the training loop, and early stopping."""

import logging
import math
import statistics
from collections import Counter, deque
from typing import Protocol

from torch import Tensor

from dpo.training.settings import EarlyStopSettings

ALARM_NATS = 100.0
"""Mean change of a completion's log-prob that raises an alarm: a factor of e^100 in its probability."""
ALARM_STEPS, ALARM_GRADIENT = 100, 100.0
"""Number of earlier gradient norms, and the ratio of a gradient norm to their median that raises an alarm."""

log = logging.getLogger(__name__)


class Callback(Protocol):
    """An observer of the training loop. Subclasses override the methods that they need."""

    def on_start(self, resumed_step: int, history: list[dict[str, float]]) -> None:
        """Handle the start of training. If it resumes, `history` has the entries of the steps up to then."""
        return

    def on_log(self, entry: dict[str, float]) -> None:
        """Handle the log entry of a step. `step` is its number; the last entry has only `train_runtime`."""
        return

    def on_end(self) -> None:
        """Handle the end of training."""
        return


class DivergenceAlarm(Callback):
    """Warns if the policy diverges from its reference. The loss alone does not show this: it may be near 0.

    The 1st, 2nd, 4th, 8th, ... step with a cause is reported, so that a long training does not fill the log.
    """

    def __init__(self) -> None:
        self.norms: deque[float] = deque(maxlen=ALARM_STEPS)
        self.counts = Counter[str]()

    def on_start(self, resumed_step: int, history: list[dict[str, float]]) -> None:
        """Recall the gradient norms of earlier steps."""
        self.norms.extend(entry["grad_norm"] for entry in history)

    def on_log(self, entry: dict[str, float]) -> None:
        """Compare the mean log-ratios of a step with `ALARM_NATS`, and its gradient norm with earlier ones."""
        moved = [abs(entry.get(name, 0.0)) for name in ("logratios/chosen", "logratios/rejected")]
        if max(moved) > ALARM_NATS and self._is_reported("log-probs"):
            log.warning(
                "step %d: the policy diverges from its reference: log-probs of chosen moved by %.0f nats, "
                "of rejected by %.0f, margin %.3g, loss %.3g; lower the learning rate or raise beta",
                *(entry["step"], *moved, entry.get("rewards/margins", math.nan), entry["loss"]),
            )
        if "grad_norm" not in entry:
            return
        norm, median = entry["grad_norm"], statistics.median(self.norms) if len(self.norms) >= 5 else math.inf
        self.norms.append(norm)
        if norm > ALARM_GRADIENT * median > 0 and self._is_reported("gradient"):
            log.warning(
                "step %d: the gradient norm is %.3g, %.0f times the median of the steps before; check the pairs "
                "of this step, or lower the learning rate or max_grad_norm",
                *(entry["step"], norm, norm / median),
            )

    def _is_reported(self, cause: str) -> bool:
        self.counts[cause] += 1
        return self.counts[cause].bit_count() == 1


class EarlyStop:
    """Ends training after some validations without a new best loss, and keeps the best weights in `best`."""

    def __init__(self, settings: EarlyStopSettings, weights: dict[str, Tensor]) -> None:
        self.settings, self.weights = settings, weights
        self.best_loss, self.waited = math.inf, 0
        self.best: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        """Whether training must stop."""
        return self.waited >= self.settings.patience

    def update(self, loss: float) -> None:
        """Copy the weights if the validation loss is the best so far."""
        self.waited += 1
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}
