"""Stage `online`: train a policy on ranked pairs of its own responses: `python -m tasks.online TRIAL`."""

from dpo.online.dpo_rounds import DpoRounds
from tasks.common.rounds import train_in_rounds
from tasks.common.runner import run_launched


def main() -> None:
    """Train one trial with DPO in rounds."""
    train_in_rounds("online", DpoRounds)


if __name__ == "__main__":
    run_launched(main)
