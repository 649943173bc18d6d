"""A sweep on several machines: a head and two clones with workers, one Prefect server, one remote for data."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from flows.servers import is_healthy
from tests.support.models import free_ports
from tests.support.project import ENV, ROOT

AUTHOR = {f"GIT_{role}_{key}": "t@e" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
IMPATIENT = "import flows.distributed as d; d.LOST_SECONDS = 25; from flows.pipeline import main; main()"
"""The pipeline with less patience for machines without a sign of life."""


def run(folder: Path, *command: str, code: int = 0, **env: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**ENV, **env}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def git(folder: Path, *words: str) -> str:
    return run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words)


def copy_flows(head: Path) -> None:
    """Copy the packages that flows need to a checkout."""
    for name in ("dpo", "tasks", "flows"):
        shutil.copytree(ROOT / name, head / name, ignore=shutil.ignore_patterns("__pycache__"))


class Machines:
    """A head and two clones. `fill` makes the checkout of the head, without a git repository and a DVC remote.

    `remote` adds DVC's default remote. `env` has variables for all processes.
    """

    def __init__(
        self, place: Path, fill: Callable[[Path], object], remote: Callable[[Path], object], **env: str
    ) -> None:
        self.place, self.head = place, place / "head"
        (port,) = free_ports(1)
        self.env = {
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_HOME": str(place / "prefect"),
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
            **AUTHOR,
            **env,
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        git(place, "init", "-q", "--bare", "origin")
        fill(self.head)
        if not (self.head / ".git").exists():
            git(self.head, "init", "-q")
            run(self.head, "dvc", "init", "-q")
        git(self.head, "remote", "add", "origin", str(place / "origin"))
        remote(self.head)
        git(self.head, "add", "-A")
        git(self.head, "commit", "-qm", "start")
        git(self.head, "push", "-q", "origin", "HEAD:main")
        git(place / "origin", "symbolic-ref", "HEAD", "refs/heads/main")
        self.start("server", place, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
        self.await_server()
        for name in ("one", "two"):
            self.clone(name)

    def clone(self, name: str) -> Path:
        git(self.place, "clone", "-q", "origin", name)
        return self.place / name

    def start(self, name: str, folder: Path, *command: str, **env: str) -> None:
        with (self.place / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=folder, env={**ENV, **self.env, **env},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def await_server(self) -> None:
        deadline = time.monotonic() + 120
        while not is_healthy(f"{self.env['PREFECT_API_URL']}/health"):
            assert time.monotonic() < deadline
            time.sleep(0.3)

    def log(self, name: str) -> str:
        """Return the output of a process, or nothing if it was not started."""
        file = self.place / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def start_worker(self, name: str) -> None:
        """Start the documented command in a clone, and wait until the worker is online."""
        pool = run(self.head, sys.executable, "-m", "flows.identity", **self.env).strip() + "-trials"
        words = ["worker", "start", "--pool", pool, "--type", "process", "--limit", "1", "--name", name]
        folder, before = self.place / name, self.log(name).count(f"Worker '{name}' started")
        self.start(name, folder, "prefect", *words, DPO_WORKSPACE=str(folder), PREFECT_WORKER_QUERY_SECONDS="1")
        deadline = time.monotonic() + 120
        while self.log(name).count(f"Worker '{name}' started") == before:
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def kill_worker(self, name: str) -> None:
        """Kill a worker and what it runs, as the loss of its machine does."""
        worker = psutil.Process(self.processes.pop(name).pid)
        for each in [*worker.children(recursive=True), worker]:
            with suppress(psutil.Error):
                each.send_signal(signal.SIGKILL)
        worker.wait()

    def stages_running(self, name: str, module: str) -> list[psutil.Process]:
        """Return the processes of a stage's module below a worker."""
        found = []
        for each in psutil.Process(self.processes[name].pid).children(recursive=True):
            with suppress(psutil.Error):
                if module in each.cmdline():
                    found.append(each)
        return found

    def begin_sweep(self, head: Path | None = None, **env: str) -> subprocess.Popen[bytes]:
        """Start a distributed sweep that notices lost machines soon."""
        return subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, "--distributed"], cwd=head or self.head,
            env={**ENV, **self.env, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def sweep(self, head: Path | None = None, **env: str) -> str:
        return self.finish(self.begin_sweep(head, **env))

    def finish(self, flow: "subprocess.Popen[bytes]") -> str:
        output = flow.communicate(timeout=900)[0].decode()
        assert flow.returncode == 0, output[-6000:]
        return output

    def close(self) -> None:
        for process in self.processes.values():
            with suppress(psutil.Error):
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                for each in family:
                    each.send_signal(signal.SIGKILL)
            process.wait()


class Line:
    """A TCP connection to a server that can be cut: while it is cut, connections are refused."""

    def __init__(self, target: int) -> None:
        (self.port,) = free_ports(1)
        self.target, self.open = target, set[socket.socket]()
        self.listener: socket.socket | None = None
        self.restore()

    def restore(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self.listener], daemon=True).start()

    def cut(self) -> None:
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for each in list(self.open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self.open |= {here, there}
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._copy, args=[source, sink], daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            self.open.discard(each)


def add_s3_remote(head: Path, port: int) -> None:
    """Add the bucket `results` of the S3 server at a port as DVC's default remote."""
    run(head, "dvc", "remote", "add", "-q", "--default", "store", "s3://results/dpo")
    run(head, "dvc", "remote", "modify", "-q", "store", "endpointurl", f"http://127.0.0.1:{port}")


S3_ENV = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(bucket: str) -> Iterator[Line]:
    """Start an S3 server with a bucket; yield the line to it."""
    (port,) = free_ports(1)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    line = Line(port)
    try:
        deadline = time.monotonic() + 120
        while not is_healthy(f"http://127.0.0.1:{port}"):
            assert time.monotonic() < deadline
            assert server.poll() is None
            time.sleep(0.3)
        httpx.put(f"http://127.0.0.1:{port}/{bucket}", trust_env=False).raise_for_status()
        yield line
    finally:
        line.cut()
        server.kill()
        server.wait()
