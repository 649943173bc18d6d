"""Sweep over losses, betas, learning rates and seeds: `python -m flows.sweep --betas 0.05 0.1 --seeds 17 18`.

The flow writes the lists to `params.yaml` and runs the pipeline. DVC expands the trials: the DAG is defined once,
a trial that is up to date is not trained again, and `git diff params.yaml` shows the request. DVC's experiment
queue would train the trials in folders and workers that Prefect does not see.
"""

import argparse
import sys
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field, PositiveFloat, PositiveInt
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from dpo.common.errors import InputError
from dpo.common.files import atomic_write
from dpo.config import load_params
from dpo.training.settings import LossName
from flows.pipeline import name_flow_run, pipeline, run_now

PARAMS = Path("params.yaml")
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Representer(RoundTripRepresenter):
    """Writes null as `null`, where ruamel's own writes nothing."""


Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


@flow(name="sweep", flow_run_name=name_flow_run)
def sweep(
    losses: list[LossName] | None = None,
    betas: list[PositiveFloat] | None = None,
    learning_rates: list[PositiveFloat] | None = None,
    seeds: list[Seed] | None = None,
    parallel: PositiveInt = 1,
) -> dict[str, str]:
    """Train and compare one policy for every combination; a list that is not given stays as it is.

    Args:
        losses: objectives, by name.
        betas: strengths of the KL constraint.
        learning_rates: peak learning rates.
        seeds: orders of the training pairs.
        parallel: stages that run at once.

    Returns:
        What DVC did with each stage.

    Raises:
        InputError: the lists make no valid `params.yaml`, which then stays as it was.
        StageError: a stage failed; what needs it was not run, all else was.
    """
    asked = {"losses": losses, "betas": betas, "learning_rates": learning_rates, "seeds": seeds}
    set_lists({name: values for name, values in asked.items() if values is not None})
    return pipeline(parallel)


def set_lists(lists: dict[str, list[LossName] | list[float] | list[int]]) -> None:
    """Write lists to `sweep` in `params.yaml`; comments stay, and so does the file if they are invalid."""
    before = PARAMS.read_bytes()
    yaml = YAML()
    yaml.Representer, yaml.width = Representer, 4096
    params = yaml.load(before)
    for name, values in lists.items():
        params["sweep"][name][:] = values
    with atomic_write(PARAMS) as tmp:
        yaml.dump(params, tmp)
    try:
        load_params(PARAMS)
    except InputError:
        with atomic_write(PARAMS) as tmp:
            tmp.write_bytes(before)
        raise


def main() -> int:
    """Run the flow now, on the server of PREFECT_API_URL or else on one of its own; exit code 1 on failure."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=main.__doc__)
    parser.add_argument("--losses", nargs="+", metavar="NAME")
    parser.add_argument("--betas", nargs="+", type=float, metavar="BETA")
    parser.add_argument("--learning-rates", nargs="+", type=float, metavar="RATE")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="stages at once (default: 1)")
    return 0 if run_now(sweep, **vars(parser.parse_args())).is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
