"""Benchmark tasks of lm_eval on several models, with intervals and paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo.common.errors import InputError
from dpo.evaluation.bootstrap import bootstrap, mean, paired_test

if TYPE_CHECKING:
    import pandas as pd

OWN_TASKS = Path("data/own/capabilities")
"""Folder with YAML tasks of your own."""
WHERE = "params.yaml: capabilities.tasks"


def answers(model: Any, tokenizer: Any, task: str, examples: int | None) -> "pd.DataFrame":
    """Run a task of lm_eval on a model and return its results by example.

    Returns:
        One row per example: `id`, unique in the task; one column for each metric with one number per example, the
        task's main metric first. `attrs` has `higher_is_better` by metric.

    Raises:
        InputError: lm_eval is not installed, it has no such task, or the task has no metric per example.
    """
    import pandas as pd

    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        fix = "install it with `pip install 'dpo-pipeline[capabilities]'`, or set capabilities.tasks to []"
        raise InputError(f"{WHERE}: lm_eval is not installed ({error}); {fix}") from error

    manager = TaskManager(include_path=str(OWN_TASKS) if OWN_TASKS.is_dir() else None)
    if task not in manager.all_tasks:
        raise InputError(f"{WHERE}: {task!r} is neither a task of lm_eval nor a YAML task in {OWN_TASKS}")
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    done: Any = simple_evaluate(
        language_model, tasks=[task], limit=examples, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    rows: list[dict[str, Any]] = []
    better: dict[str, bool] = {}
    for name, documents in done["samples"].items():
        metrics = [
            metric for metric in done["higher_is_better"].get(name, {}) if _is_number(documents[0].get(metric))
        ]
        better |= {metric: done["higher_is_better"][name][metric] for metric in metrics}
        rows += [{"id": f"{name}/{each['doc_id']}"} | {m: float(each[m]) for m in metrics} for each in documents]
    if not better:
        raise InputError(f"{WHERE}: {task} has no metric with one number per example; use another task")
    table = pd.DataFrame(rows).drop_duplicates("id", ignore_index=True)  # one row per filter of the answers
    table.attrs["higher_is_better"] = better
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number)


def compare_answers(tables: Mapping[str, "pd.DataFrame"], policy: str, seed: int) -> dict[str, Any]:
    """Return the main metric of each model, and the difference between the policy and each other model.

    `tables` has the results of `answers` by model, on the same examples.

    Returns:
        `metric`, `higher_is_better`, `examples`; `models`, by name `value` and its 95% interval `value_ci`;
        `differences`, by name of the other model `difference`, policy minus other, `difference_ci`, and `p` of the
        paired sign-flip test, not adjusted. Intervals are bootstrap intervals over examples.
    """
    first = tables[policy]
    metric = next(name for name in first.columns if name != "id")
    values = {name: table.set_index("id").loc[first["id"], metric].to_numpy() for name, table in tables.items()}
    examples = range(len(first))
    others = [name for name in tables if name != policy]
    return {
        "metric": metric,
        "higher_is_better": first.attrs["higher_is_better"][metric],
        "examples": len(first),
        "models": {name: bootstrap({"value": mean(each)}, examples, seed) for name, each in values.items()},
        "differences": {name: _difference(values[policy] - values[name], examples, seed) for name in others},
    }


def _difference(differences: np.ndarray, examples: Sequence[int], seed: int) -> dict[str, Any]:
    found = bootstrap({"difference": mean(differences)}, examples, seed)
    return found | {"p": paired_test(differences.tolist(), examples, seed)}


def drop(result: Mapping[str, Any], other: str) -> float:
    """Return by how much the policy is worse than another model in a result of `compare_answers`."""
    difference: float = result["differences"][other]["difference"]
    return -difference if result["higher_is_better"] else difference
