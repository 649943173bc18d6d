"""An example of a loss: `losses.custom.function: functions.losses.squared_hinge:squared_hinge`."""

from torch import Tensor

from dpo.training.losses import PairBatch


def squared_hinge(pairs: PairBatch, beta: float) -> Tensor:
    """Return max(0, 1 - beta h)^2 of each pair."""
    ratios = pairs.policy - pairs.reference
    return (1 - beta * (ratios[:, 0] - ratios[:, 1])).relu() ** 2
