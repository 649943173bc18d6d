"""An example of a judge: `{kind: scorer, function: functions.judges.brevity:brevity}`."""

from collections.abc import Sequence
from typing import Any


def brevity(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """Return minus the number of words of each response, so that the shorter one wins."""
    return [-float(len(response.split())) for response in responses]
