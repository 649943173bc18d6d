"""Host memory of four processes that load a random model of 1 GB with sharded weights.

    python -m benchmarks.sharding    # writes benchmarks/results/sharding.json and its table in scaling.md

Each process reports its private memory (USS): empty, which is with the process group and all imports; with the
loaded model; and at the peak of loading and of a pass of 256 tokens. Mapped pages of the files are not in it.
Large blocks are allocated by `mmap`, so that freed memory is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measure import maxima
from benchmarks.page import put_table
from benchmarks.random_model import save_shape
from dpo.common.distributed import share, this_process
from dpo.common.files import write_json
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.tokenization import TokenRow

RESULTS, PAGE = Path("benchmarks/results/sharding.json"), Path("docs/internals/scaling.md")
CONFIG = "configs/one-node-fsdp.yaml"
ALLOCATOR = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
SHAPE = LlamaConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=4, tie_word_embeddings=True,
)  # fmt: skip
PROCESSES, MB = 4, 1e6
COLUMNS = ("empty", "loaded", "peak while loading", "peak of a pass")


def memory() -> float:
    """Return the private memory of this process in bytes."""
    return float(psutil.Process().memory_full_info().uss)


def process(folder: Path, out: Path) -> None:
    """Measure one of the launched processes."""
    state = this_process()
    state.wait_for_everyone()
    time.sleep(1)  # threads of the process group start
    empty = memory()
    with maxima(lambda: [memory()]) as loading:
        model = load_model(folder, frozen=True)
    loaded = memory()
    row = TokenRow("", tuple(range(1, 129)), (tuple(range(64)), tuple(range(64, 128))))
    with maxima(lambda: [memory()]) as scoring:
        sequence_logps(model, [row], 256)
    figures = dict(zip(COLUMNS, (empty, loaded, loading[0], scoring[0]), strict=True))
    parts = share(state.num_processes, lambda mine: [figures for _ in mine])
    if state.is_main_process:
        write_json(out, parts)


def measure(folder: Path) -> dict[str, float]:
    """Return the sums over all processes in MB: empty, and above that."""
    out = folder / "result.json"
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(PROCESSES), "--config_file", CONFIG]
    command = [*launch, "-m", "benchmarks.sharding", "--process", str(folder), str(out)]
    subprocess.run([sys.executable, *command], check=True, env={**os.environ, **ALLOCATOR})
    parts = json.loads(out.read_text())
    sums = {name: sum(part[name] for part in parts) / MB for name in parts[0]}
    return {name: value - (name != "empty") * sums["empty"] for name, value in sums.items()}


def table(results: dict[str, Any]) -> str:
    """Return the table of the sums over the processes."""
    sums = results["sums_mb"]
    cells = [f"{results['model_mb']:,.0f}", *(f"{sums[name]:,.0f}" for name in COLUMNS)]
    return "\n".join(
        [
            f"| model, MB | {', MB | '.join(COLUMNS)}, MB |",
            "| ---: |" + " ---: |" * len(COLUMNS),
            f"| {' | '.join(cells)} |",
        ]
    )


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="only write the table from the results")
    arguments = parser.parse_args()
    if arguments.process:
        process(*arguments.process)
        return
    if not arguments.table:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            save_shape(SHAPE, folder)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32)
            size = sum(weight.numel() * 4 for weight in model.parameters()) / MB
            model.save_pretrained(folder)
            del model
            sums = measure(folder)
        versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
        write_json(RESULTS, {"model_mb": size, "processes": PROCESSES, "sums_mb": sums, "versions": versions})
    put_table(PAGE, "sharding", table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
