"""Sweep over losses, betas, learning rates and seeds: `python -m flows.sweep --betas 0.05 0.1 --seeds 17 18`.

The flow writes the lists to `params.yaml` and runs the pipeline. DVC expands the trials, so the DAG is defined
once and a trial that is up to date is not trained again; `git diff params.yaml` shows the change. The next
retraining restores the committed lists. DVC's experiment queue is not used: it trains in folders and workers that
Prefect does not see.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow, get_run_logger
from pydantic import PositiveFloat, PositiveInt
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from dpo.common.errors import InputError
from dpo.common.files import atomic_write, sha256, write_json
from dpo.common.settings import Seed
from dpo.config import load_params
from dpo.training.losses import LossName
from flows.artifacts import failure_page
from flows.git import git
from flows.journal import WORK
from flows.pipeline import name_flow_run, pipeline, run_now
from tasks.common.git import committed_file

PARAMS = Path("params.yaml")
RECORD = WORK / "sweep.json"
"""The SHA-256 of `params.yaml` after a sweep changed it, if it had no other uncommitted change."""


@flow(name="sweep", flow_run_name=name_flow_run)
def sweep(
    losses: list[LossName] | None = None,
    betas: list[PositiveFloat] | None = None,
    learning_rates: list[PositiveFloat] | None = None,
    seeds: list[Seed] | None = None,
    parallel: PositiveInt = 1,
) -> dict[str, str]:
    """Train and compare one policy per combination. Lists that are not given keep their values.

    Returns what DVC did with each stage. Raises InputError if a list is invalid; `params.yaml` is then unchanged.
    Raises StageError if a stage failed; stages that need it did not run, all others did.

    Args:
        losses: objectives, by name; they are written to `losses` or `reference_free_losses`.
        betas: strengths of the KL constraint.
        learning_rates: peak learning rates.
        seeds: orders of the training pairs.
        parallel: stages to run at once.
    """
    lists = {"losses": losses, "betas": betas, "learning_rates": learning_rates, "seeds": seeds}
    with failure_page("Sweep"):
        given = {name: values for name, values in lists.items() if values is not None}
        only_sweeps = changed_by_sweeps() or PARAMS.read_bytes() == committed_file(PARAMS)
        set_lists(given)
        if only_sweeps:
            write_json(RECORD, sha256(PARAMS))
        return pipeline(parallel)


def changed_by_sweeps() -> bool:
    """Return whether sweeps, and nothing else, have changed `params.yaml` since the commit."""
    return RECORD.exists() and json.loads(RECORD.read_text()) == sha256(PARAMS)


def restore_settings() -> None:
    """Restore the committed `params.yaml` if only sweeps have changed it; `git stash` keeps the lists."""
    if changed_by_sweeps() and PARAMS.read_bytes() != committed_file(PARAMS):
        stash = git("stash", "create")
        git("stash", "store", "--message", "settings of a sweep, replaced by a retraining", stash)
        git("restore", "--source=HEAD", "--staged", "--worktree", "--", str(PARAMS))
        get_run_logger().warning(
            "%s: the lists of a sweep are replaced by the committed ones; `git stash list` has them", PARAMS
        )
    RECORD.unlink(missing_ok=True)


class _Representer(RoundTripRepresenter):
    """Write None as `null`, as `params.yaml` does; ruamel writes an empty value."""

    def represent_none(self, _: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def set_lists(lists: Mapping[str, Sequence[LossName | float]]) -> None:
    """Write lists to `sweep` in `params.yaml` and keep its comments. Invalid lists leave the file unchanged."""
    before = PARAMS.read_bytes()
    if "losses" in lists:
        lists = {**lists, **load_params(PARAMS).loss_lists(map(str, lists["losses"]))}
    yaml = YAML()
    yaml.width = 4096
    yaml.Representer = _Representer
    params = yaml.load(before)
    for name, values in lists.items():
        params["sweep"][name][:] = values
    for loss in (*params["sweep"]["losses"], *params["sweep"]["reference_free_losses"]):
        params["losses"].setdefault(loss, {})  # DVC tracks the settings of every loss of the sweep
    with atomic_write(PARAMS) as tmp:
        yaml.dump(params, tmp)
    try:
        load_params(PARAMS)
    except InputError:
        with atomic_write(PARAMS) as tmp:
            tmp.write_bytes(before)
        raise


def main() -> None:
    """Run the flow on the server of PREFECT_API_URL, else on a temporary one. Exit with 1 if a stage failed."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=main.__doc__)
    parser.add_argument("--losses", nargs="+", metavar="NAME")
    parser.add_argument("--betas", nargs="+", type=float, metavar="BETA")
    parser.add_argument("--learning-rates", nargs="+", type=float, metavar="RATE")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="stages to run at once (default: 1)")
    run_now(sweep, **vars(parser.parse_args()))


if __name__ == "__main__":
    main()
