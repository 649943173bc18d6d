"""Start scripts in several processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.models import free_ports

ROOT = Path(__file__).parents[2]
FSDP = ROOT / "configs/one-node-fsdp.yaml"


def start(processes, *arguments, config=None):
    """Run a Python script in one process, or with `accelerate launch` over gloo. Return the completed process."""
    (port,) = free_ports(1)
    launch = [
        *("-m", "accelerate.commands.launch", "--num_processes", str(processes)),
        *("--num_machines", "1", "--main_process_port", str(port), "--mixed_precision", "no"),
        *(["--config_file", str(config)] if config else ["--multi_gpu", "--dynamo_backend", "no"]),
    ]
    command = [sys.executable, *(launch if processes > 1 else []), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
