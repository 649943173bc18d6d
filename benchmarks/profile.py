"""Profile a training step: `python -m benchmarks.profile`, writes a table of `docs/internals/benchmarks.md`.

The step is a DPO step of 8 pairs with AdamW on the CPU, as in the cases of the engine, with the allocator
settings of training. torch's profiler slows small operations down more than large ones.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from benchmarks.cases import PAIRS_PER_STEP, long_rows, short_rows
from benchmarks.measure import alone
from benchmarks.page import put_table
from dpo.engine.logprobs import load_model
from dpo.engine.packing import pack
from dpo.engine.tokenization import TokenRow
from dpo.training.losses import Sigmoid
from dpo.training.objectives import DpoObjective
from tasks.common.allocator import TRAINING

PAGE, MODEL = Path("docs/internals/benchmarks.md"), Path("models/base")
GROUPS = {
    "matrix products": ("mm", "addmm", "bmm", "linear"),
    "attention": ("scaled_dot_product",),
    "optimizer and clipping": ("adamw", "foreach", "linalg_vector_norm"),
    "softmax of the vocabulary": ("softmax", "logsumexp", "exp", "sub", "amax"),
    "fills and copies": ("fill_", "zero_", "copy_", "cat", "index", "embedding"),
    "elementwise": ("mul", "add", "silu", "pow", "mean", "rsqrt", "neg", "div", "sum"),
}
"""Names of operations, or parts of names. The first match counts."""


def step(model: torch.nn.Module, rows: list[TokenRow], micro_batch: int, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step over the rows, from a reference that gives every completion 0."""
    objective = DpoObjective(Sigmoid(), 0.1, lambda batch: torch.zeros(batch.completions))
    for start in range(0, len(rows), micro_batch):
        batch = pack(rows[start : start + micro_batch])
        loss, _ = objective(model, batch)
        (loss / len(rows)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def shares(rows: list[TokenRow], micro_batch: int) -> dict[str, float]:
    """Return each group's share of the self time of all operations."""
    model = load_model(MODEL).train()
    model.accumulate_in_place = True  # as in training with one process
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    step(model, rows, micro_batch, optimizer)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(model, rows, micro_batch, optimizer)
    times: dict[str, float] = defaultdict(float)
    for operation in recorded.key_averages():
        times[group(operation.key)] += operation.self_cpu_time_total
    return {name: times[name] / sum(times.values()) for name in (*GROUPS, "other")}


def group(operation: str) -> str:
    """Return the group of an operation, by exact name, else by part of the name."""
    name = operation.removeprefix("aten::")
    exact = [label for label, names in GROUPS.items() if name.strip("_") in {n.strip("_") for n in names}]
    partly = [label for label, names in GROUPS.items() if any(len(n) > 4 and n in name for n in names)]
    return next(iter(exact + partly), "other")


def main() -> None:
    """Profile short pairs in one micro-batch and in small ones, and long pairs in small ones."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    short, long = short_rows(tokenizer, PAIRS_PER_STEP), long_rows(tokenizer, PAIRS_PER_STEP)
    cases = {
        "short, 8 pairs per micro-batch": (short, 8),
        "short, 2 pairs": (short, 2),
        "long, 1 pair": (long, 1),
    }
    results = {name: alone(shares, *case, **TRAINING) for name, case in cases.items()}
    lines = ["| share of time | " + " | ".join(cases) + " |", "| --- |" + " ---: |" * len(cases)]
    for label in (*GROUPS, "other"):
        lines.append(f"| {label} | " + " | ".join(f"{result[label]:.0%}" for result in results.values()) + " |")
    put_table(PAGE, "profile", "\n".join(lines))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
