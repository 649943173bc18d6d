"""Stage `capabilities`: run a benchmark task on the selected policy, its reference and the base model.

The report exists before the stage runs, so it loads the results from a script that the stage writes beside it.
"""

import json
import sys
from typing import Any

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.config import Params, load_params
from dpo.engine.base_model import load_checkpoint
from dpo.engine.pretrained import load_tokenizer
from dpo.evaluation.capabilities import answers, compare_answers
from tasks.common import paths
from tasks.common.runner import run

BASE_MODEL = "base model"


def main() -> None:
    """Run the task that is the stage's only argument, and write and log the results."""
    params = load_params()
    tasks = params.capabilities.tasks
    if len(sys.argv) != 2 or sys.argv[1] not in tasks:
        given = " ".join(sys.argv[1:])
        raise InputError(
            f"TASK: {given!r} is not in params.yaml: capabilities.tasks; use one of {', '.join(tasks)}"
        )
    task = sys.argv[1]
    selected = json.loads(paths.COMPARISON.read_text())["selected"]
    result: dict[str, Any] = {"task": task, "policy": selected}
    if selected is not None:
        result |= measure(params, task, selected)
    write_json(paths.capability(task), result)
    with atomic_write(paths.capability_script(task)) as tmp:
        tmp.write_text(f"addCapability({json.dumps(result, sort_keys=True)});\n")
    if selected is not None:
        from tasks.tracking.runs import log_capability  # after the measurement: MLflow starts slowly

        log_capability(params, result)


def measure(params: Params, task: str, selected: str) -> dict[str, Any]:
    """Return the results of the models, which are loaded one after the other."""
    trial = next(trial for trial in params.trials() if trial.name == selected)
    folders = {selected: paths.policy_folder(trial), "reference": paths.REFERENCE}
    if params.sft is not None:
        folders[BASE_MODEL] = paths.BASE
    tables = {}
    for name, folder in folders.items():
        model = load_checkpoint(folder).to(this_process().device).eval()
        tables[name] = answers(model, load_tokenizer(folder), task, params.capabilities.examples)
    return compare_answers(tables, selected, params.seed)


if __name__ == "__main__":
    run(main)
