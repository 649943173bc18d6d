"""Stage `rloo`: train a policy by RLOO on its own responses: `python -m tasks.rloo TRIAL`."""

from dpo.online.rloo_rounds import RlooRounds
from tasks.common.rounds import train_in_rounds
from tasks.common.runner import run_launched


def main() -> None:
    """Train one trial with RLOO in rounds."""
    train_in_rounds("rloo", RlooRounds)


if __name__ == "__main__":
    run_launched(main)
