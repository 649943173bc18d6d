"""A benchmark task of lm_eval with local data."""

import json
from pathlib import Path

NAME = "own_choice"
ROWS = [{"question": f"Is {number} even?", "label": number % 2} for number in range(8)]
TASK = f"""
task: {NAME}
dataset_path: json
dataset_kwargs: {{data_files: data/own/capabilities/{NAME}.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_choice: [" yes", " no"]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(project: Path) -> None:
    """Write the task and its data to a project's folder of own tasks."""
    folder = project / "data/own/capabilities"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.yaml").write_text(TASK)
    (folder / f"{NAME}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
