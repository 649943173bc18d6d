"""A Prefect server with a database of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.servers import is_healthy
from tests.support.models import free_ports


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """Start `prefect server` with all its services; yield the address of its API."""
    (port,) = free_ports(1)
    api = f"http://127.0.0.1:{port}/api"  # also for the pages in a browser
    home.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        cwd=home, env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_API_URL": api}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not is_healthy(f"{api}/health"):
            assert process.poll() is None
            time.sleep(0.2)
        yield api
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
