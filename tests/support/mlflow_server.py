"""An MLflow server that a test can kill and restart."""

import os
import signal
import subprocess
import sys
import time

import httpx

from tests.support.models import free_ports


class Server:
    """`mlflow server` with the same port and store after every restart."""

    def __init__(self, folder):
        (self.port,) = free_ports(1)
        self.url, self.folder = f"http://127.0.0.1:{self.port}", folder

    def start(self):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"),
                *("--artifacts-destination", str(self.folder / "artifacts")),
            ],
            cwd=self.folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while self.process.poll() is None:
            try:
                return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.1)
        raise ChildProcessError("mlflow server exited")

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
