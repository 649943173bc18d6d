"""Print the comparison of all policies."""

import json
import re
import textwrap
from typing import Any

from dpo.common.errors import InputError
from dpo.common.files import PROVENANCE
from tasks.common.paths import CAPABILITIES, COMPARISON, FRONTIER_LINK, REFERENCE, REWARD_MODELS, SELECTION

COLUMNS = {"reward_accuracy": "reward accuracy", "margin": "margin", "kl": "KL (nats)", "win_rate": "win rate"}

COSTS = ("pairs / prompts", "sampled tokens", "scored tokens", "trained tokens", "TFLOPs", "minutes / GiB")
"""Titles of the columns of costs."""


def show() -> None:
    """Print metrics, selection, reason and where to find more. Raise InputError if `compare` has not run."""
    if not COMPARISON.is_file():
        raise InputError(f"{COMPARISON}: no such file; run `make repro` first")
    comparison = json.loads(COMPARISON.read_text())
    policies = comparison["policies"]
    print("".join(f"{title:>24}" for title in ("policy", *COLUMNS.values())))
    for key, row in policies.items():
        print(f"{key:>24}" + "".join(f"{_with_interval(row, name):>24}" for name in COLUMNS))
    print(f"\n{'cost':>24}" + "".join(f"{title:>20}" for title in COSTS))
    for key, row in policies.items():
        if "cost" in row:
            print(f"{key:>24}" + "".join(f"{value:>20}" for value in _cost(row["cost"])))
    first = next(iter(policies.values()))
    if "human_ceiling" in first:
        print(f"\nhuman ceiling for reward accuracy on these {first['pairs']} pairs: {first['human_ceiling']:.3f}")
    if "judge_accuracy" in first:
        accuracy = _with_interval(first, "judge_accuracy")
        print(f"accuracy of the judge on {first['judge_pairs']} held-out pairs: {accuracy}")
    for path in sorted(REWARD_MODELS.glob("*.json")):
        accuracy = json.loads(path.read_text())["accuracy"]
        if "judge_accuracy" not in accuracy:  # all held-out rows are labelled rows
            continue
        shown = _with_interval(accuracy, "judge_accuracy")
        print(f"accuracy of reward model {path.stem} on {accuracy['judge_pairs']} held-out pairs: {shown}")
    print("\n" + textwrap.fill(comparison["reason"], 115))
    for line in capability_lines(comparison["selected"]):
        print(line)
    for line in serve_lines(comparison["selected"]):
        print(line)
    if link := frontier_link():
        print(f"\nreward against KL in MLflow: {link}")
    print("\nmake mlflow     experiments and sweeps, http://127.0.0.1:5000/#/experiments/1/runs")
    print("make prefect    flows and schedules, http://127.0.0.1:4200")
    print("make report     the comparison, reports/index.html")


def frontier_link() -> str | None:
    """Return the link of the comparison's page to the chart in MLflow's UI, if it has one."""
    page = SELECTION.read_text() if SELECTION.is_file() else ""
    found = re.search(rf"^\[{FRONTIER_LINK}\]\((\S+)\)$", page, re.MULTILINE)
    return found and found[1]


def capability_lines(policy: str | None) -> list[str]:
    """Return a line for each task of `capabilities` with the metric of the policy and of the other models."""
    lines = []
    for path in sorted(CAPABILITIES.glob("*.json")):
        result = json.loads(path.read_text())
        if policy is not None and result["policy"] == policy:
            models = sorted(result["models"], key=lambda name: name != policy)  # the policy first
            values = ", ".join(f"{name} {_with_interval(result['models'][name], 'value')}" for name in models)
            lines.append(f"{result['task']}, {result['metric']} on {result['examples']} examples: {values}")
    return lines


def serve_lines(policy: str | None) -> list[str]:
    """Return commands that serve the selected policy, of vLLM and, if a run of MLflow made it, of MLflow."""
    folder = REFERENCE.with_name(str(policy))
    if not (folder / PROVENANCE).is_file():
        return []
    lines = ["", f"vllm serve {folder}"]
    if run := json.loads((folder / PROVENANCE).read_text()).get("mlflow_run"):
        lines.append(f"mlflow models serve --model-uri runs:/{run}/policy --env-manager local")
    return lines


def _cost(cost: dict[str, Any]) -> list[str]:
    """Return the values of the columns `COSTS`."""
    tokens = [f"{cost[f'{work}_tokens']:,}" for work in ("sampled", "scored", "trained")]
    flops = "-" if cost["flops"] is None else f"{cost['flops'] / 1e12:.3g}"
    usage = f"{cost['minutes']:.1f} / {cost['peak_memory_gib']:.1f}"
    return [f"{cost['pairs']} / {cost['prompts']}", *tokens, flops, usage]


def _with_interval(row: dict[str, float | list[float]], name: str) -> str:
    if name not in row:
        return "-"
    low, high = row[f"{name}_ci"]  # type: ignore[misc]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"
