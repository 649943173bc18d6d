"""Bring to MLflow's server what was kept here while it did not answer: `python -m tasks.commands.sync`."""

from tasks.common.runner import run
from tasks.tracking.offline import connect


def main() -> None:
    """Deliver, as every stage does when it starts. Raises InputError if the server still does not answer."""
    connect()


if __name__ == "__main__":
    run(main)
